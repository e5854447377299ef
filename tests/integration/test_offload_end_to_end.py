"""A run whose policy leaves its memory to the engine: the numbers, checkpoints and evaluations of one that does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_nsr.observability.metrics import read_metrics
from megatron_nsr.observability.run_directory import RunDirectory
from tests.integration.small_run import Small, finished, start, values


def test_a_run_with_offload_is_the_same_bit_for_bit_also_resumed(small: Small, undisturbed: Callable[[int], Path], tmp_path: Path) -> None:
    run, offload = tmp_path / "run", "training.offload=all"
    finished(start(small.nsr(run, "run.steps=2", offload), tmp_path / "first.log"), 0)
    finished(start(small.nsr(run, "run.steps=5", offload), tmp_path / "resumed.log"), 0)
    plain = undisturbed(1)
    assert values(run)[2:4] == values(plain)[2:4]  # the second and fifth steps ended a run, with an evaluation
    policy, expected = (RunDirectory(folder).export(5) / "model.safetensors" for folder in (run, plain))
    assert policy.read_bytes() == expected.read_bytes()
    assert all(step["time/offload_s"] > 0 for step in read_metrics(run / "metrics.jsonl"))
