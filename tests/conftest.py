"""What all tests share: a quiet single-threaded process without network, and the benchmark data or a small stand-in for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import hypothesis
import pytest

hypothesis.settings.register_profile("untimed", deadline=None)  # how busy the machine is must not decide a test
hypothesis.settings.load_profile("untimed")

# Before torch and vLLM are first imported, and inherited by every process that a test starts.
for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "WANDB_MODE": "offline",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}.items():
    os.environ.setdefault(_name, _value)


# (question, worked solution, answer), written for these tests.
PROBLEMS = [
    ("What is $2+3$?", r"We add: $2+3=5$, so the answer is $\boxed{5}$.", "5"),
    ("Simplify $\\frac{6}{8}$.", r"Both are even, so $\frac{6}{8}=\boxed{\frac{3}{4}}$.", r"\frac{3}{4}"),
    ("Solve $2x=7$ for $x$.", r"Halving both sides gives $x=\boxed{3.5}$.", "3.5"),
    ("Expand $(x+1)^2$.", r"The square is $\boxed{x^2+2x+1}$.", "x^2+2x+1"),
    ("Which $x$ satisfy $x^2=9$, $x>0$?", r"Only $\boxed{3}$, as $-3$ is negative.", "3"),
    ("Give $\\sqrt{50}$ in simplest form.", r"As $50=25\cdot 2$, it is $\boxed{5\sqrt{2}}$.", r"5\sqrt{2}"),
]
# File: rows, and whether its ground truth holds a worked solution.
BENCHMARKS = {"math/train": (6, True), "math/test": (6, True), "aime2025/test": (3, False), "amc23/test": (3, False)}


@pytest.fixture(scope="session")
def benchmark_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the benchmark files, `<name>/<split>.parquet`: MEGATRON_NSR_DATA, or else a few problems in the same schema."""
    configured = os.environ.get("MEGATRON_NSR_DATA")
    if configured:
        assert Path(configured).is_dir(), f"MEGATRON_NSR_DATA={configured}: no such folder"
        return Path(configured)
    # Here, as it starts threads: after the environment above is set.
    import pyarrow
    from pyarrow import parquet

    root = tmp_path_factory.mktemp("benchmarks")
    for name, (count, with_solution) in BENCHMARKS.items():
        path = root / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist([_row(name, index, with_solution) for index in range(count)]), path)
    return root


def _row(name: str, index: int, with_solution: bool) -> dict[str, Any]:
    """One row of the schema that tools for RL after pre-training share."""
    question, solution, target = PROBLEMS[index]
    truth = {"question": question, "target": target} | ({"solution": solution} if with_solution else {})
    benchmark, split = name.split("/")
    marks = {"level": f"Level {index % 5 + 1}", "type": "Algebra"} if with_solution else {}
    return {
        **marks,
        "data_source": benchmark,
        "prompt": [{"content": question, "role": "user"}],
        "ability": "math",
        "reward_model": {"ground_truth": truth, "style": "rule"},
        "extra_info": {"index": index, "split": split},
    }
