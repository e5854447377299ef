"""RUN/state.json says how a run stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_nsr.observability.run_directory import RunDirectory
from megatron_nsr.observability.state import read_state, write_state
from megatron_nsr.types import UserError


def test_the_last_state_is_read_back(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    assert read_state(run) is None
    write_state(run, "running", 0)
    write_state(run, "stopped", 12, "SIGTERM")
    state = read_state(run)
    assert state is not None
    assert (state.status, state.step, state.reason) == ("stopped", 12, "SIGTERM")
    assert state.time.endswith("+00:00")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a state file"),
        ('{"status": "done"}', "not a state file"),
        ('{"status": "asleep", "step": 1, "reason": "", "time": ""}', "status='asleep' is none of running, stopped, failed, done"),
    ],
)
def test_a_foreign_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_state(RunDirectory(tmp_path))
