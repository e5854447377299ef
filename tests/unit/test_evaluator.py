"""An evaluation never stands where another model's belongs."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_nsr.evaluator import _refuse_mixing
from megatron_nsr.observability.run_directory import RunDirectory, write_json
from megatron_nsr.observability.state import write_state
from megatron_nsr.types import UserError


def test_another_models_evaluation_is_not_overwritten(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "evaluations")
    write_json(run.evaluation(0), {"model": "models/a"})
    _refuse_mixing(run, Path("models/a"), 0)
    _refuse_mixing(run, Path("models/b"), 7)
    with pytest.raises(UserError, match=r"step_0\.json is the evaluation of model\.path=models/a; choose another run\.dir"):
        _refuse_mixing(run, Path("models/b"), 0)


def test_a_training_run_takes_evaluations_of_its_own_models_only(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    write_state(run, "done", 3)
    _refuse_mixing(run, run.checkpoint(3), 3)
    with pytest.raises(UserError, match=r"holds a training run, which model\.path=models/b is no part of"):
        _refuse_mixing(run, Path("models/b"), 0)
