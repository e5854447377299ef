"""Measures grading: boxed MATH answers a CPU second and worker, uncached, worker processes' CPU time counted.

May import: megatron_nsr.rewards, types, psutil, pyarrow.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from megatron_nsr.rewards.extraction import last_boxed
from megatron_nsr.rewards.pool import GraderPool
from megatron_nsr.types import Prompt

Item = tuple[str, Prompt]


def load(path: Path, limit: int | None) -> dict[str, list[Item]]:
    """The measured cases: solutions against their own box, against the `target` column, and against another problem's answer."""
    truths = [row["reward_model"]["ground_truth"] for row in pq.read_table(path).to_pylist()[:limit]]
    own = [last_boxed(truth["solution"]) or "" for truth in truths]
    others = own.copy()
    random.Random(0).shuffle(others)
    golds = {"own_box": own, "target_column": [truth["target"] for truth in truths], "wrong": others}
    return {
        name: [
            (truth["solution"], Prompt(str(row), truth["question"], (), answer))
            for row, (truth, answer) in enumerate(zip(truths, answers, strict=True))
        ]
        for name, answers in golds.items()
    }


def cpu_seconds() -> float:
    """User and system time of this process and of its living workers."""
    process = psutil.Process()
    times = [each.cpu_times() for each in (process, *process.children())]
    return sum(each.user + each.system for each in times)


def measure(items: list[Item], workers: int, repeats: int) -> dict[str, Any]:
    """Grades the items without a cache in fresh workers each time; reports the median rate."""
    rates, walls = [], []
    for _ in range(repeats):
        with GraderPool("math_verify", workers=workers, timeout_s=10.0, memory_limit_mib=2048, cache_size=0) as pool:
            cpu, wall = cpu_seconds(), time.perf_counter()
            verdicts = pool.grade(items)
            rates.append(len(items) / (cpu_seconds() - cpu))
            walls.append(len(items) / (time.perf_counter() - wall))
    return {
        "answers": len(items),
        "answers_per_cpu_second": round(sorted(rates)[len(rates) // 2], 1),
        "answers_per_second": round(sorted(walls)[len(walls) // 2], 1),
        "all_rates_per_cpu_second": [round(rate, 1) for rate in rates],
        "verdicts": dict(Counter(f"{verdict.outcome.value}/{verdict.reason.value}" for verdict in verdicts)),
    }


def slow_path(items: list[Item]) -> list[Item]:
    """The items whose answer or reference is no plain integer: nothing exact decides them for free."""
    return [item for item in items if not ((last_boxed(item[0]) or "").lstrip("-").isdigit() and item[1].answer.lstrip("-").isdigit())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(os.environ.get("MEGATRON_NSR_DATA", "data")) / "math" / "test.parquet"
    parser.add_argument("--data", type=Path, default=default, help="MATH's test file; $MEGATRON_NSR_DATA/math/test.parquet unless told")
    parser.add_argument("--limit", type=int, help="only the first problems")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    cases = load(arguments.data, arguments.limit)
    cases["wrong_not_integers"] = slow_path(cases["wrong"])
    results = {
        "workers": arguments.workers,
        "goal_answers_per_cpu_second": 150,
        "cases": {name: measure(items, arguments.workers, arguments.repeats) for name, items in cases.items()},
    }
    text = json.dumps(results, indent=2)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
