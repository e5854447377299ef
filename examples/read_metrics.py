"""A run's numbers in pandas: every metric of every step as one table, and two questions put to it.

    python -m examples.read_metrics runs/quickstart/psr runs/quickstart/nsr

docs/metrics.md says what the columns mean. A metric that a step does not have is NaN there, such as Pass@k between evaluations.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from megatron_nsr.observability.metrics import read_metrics

LAST = 10  # steps


def load(runs: Sequence[Path]) -> pd.DataFrame:
    """One row for each (run, step), one column a metric."""
    tables = {run.name: pd.DataFrame(read_metrics(run / "metrics.jsonl")).set_index("step") for run in runs}
    return pd.concat(tables, names=["run"])


def pass_at_k(metrics: pd.DataFrame) -> pd.DataFrame:
    """Pass@k of every benchmark, at the steps that were evaluated."""
    return metrics.filter(regex=r"^eval/.*/pass@").dropna(how="all")


def signs(metrics: pd.DataFrame) -> pd.DataFrame:
    """What correct (psr) and wrong (nsr) responses look like, mean over each run's last steps."""
    names = ["reward/correct_ratio", "rollout/response_tokens_mean", "rollout/logprob", "policy/entropy", "policy/loss"]
    columns = [column for name in names for column in (name, f"{name}_psr", f"{name}_nsr") if column in metrics]
    return metrics[columns].groupby("run").tail(LAST).groupby("run").mean().T


if __name__ == "__main__":
    table = load([Path(argument) for argument in sys.argv[1:]])
    print(pass_at_k(table).to_string(float_format="{:.3f}".format), end="\n\n")
    print(signs(table).to_string(float_format="{:.3f}".format))
