"""Stopping, killing and starting again: the numbers are those of a run that nothing disturbed."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_nsr.observability.run_directory import RunDirectory
from tests.integration.small_run import Small, finished, start, state, steps_logged, values, wait_until


def test_a_signal_while_modules_load_stops_the_run_and_touches_nothing(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # tells each module once it is loaded
    monkeypatch.setenv("MEGATRON_NSR_EXIT_STATUS", str(tmp_path / "exit_status"))
    started = start(small.nsr(tmp_path / "run"), tmp_path / "loading.log")
    wait_until(lambda: "megatron_nsr.config_files\n" in started.text, started, "it read the config")  # torch takes seconds from there
    os.killpg(started.process.pid, signal.SIGTERM)
    said = [line for line in finished(started, 3).splitlines() if not line.startswith("import time:")]
    assert said == ["megatron-nsr: SIGTERM: stopped before the run started; nothing was changed"]
    assert (tmp_path / "exit_status").read_text() == "3\n"
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_stopped_twice_and_killed_once_ends_as_an_undisturbed_one(
    small: Small, undisturbed: Callable[[int], Path], tmp_path: Path
) -> None:
    run, arguments = tmp_path / "run", small.nsr(tmp_path / "run", "run.steps=10")

    started = start(arguments, tmp_path / "start-up.log")
    wait_until(lambda: "starting ..." in started.text, started, "it told that it starts")
    started.process.send_signal(signal.SIGTERM)
    finished(started, 3)
    assert (state(run)["status"], state(run)["step"], state(run)["reason"]) == ("stopped", 0, "SIGTERM asked for it")
    assert steps_logged(run) == 0

    started = start(arguments, tmp_path / "stopped.log")
    wait_until(lambda: steps_logged(run) >= 2, started, "step 2")
    assert state(run)["status"] == "running"
    os.killpg(started.process.pid, signal.SIGTERM)  # to its children too, as schedulers do
    finished(started, 3)
    stopped_at = state(run)["step"]
    assert state(run)["status"] == "stopped" and 2 <= stopped_at < 10
    assert RunDirectory(run).latest.resolve().name == f"step_{stopped_at}"

    started = start(arguments, tmp_path / "killed.log")
    wait_until(lambda: steps_logged(run) >= stopped_at + 2, started, "the next two steps")
    os.killpg(started.process.pid, signal.SIGKILL)
    finished(started, -signal.SIGKILL)
    assert state(run)["status"] == "running"  # nobody was left to say otherwise
    resumable = int(RunDirectory(run).latest.resolve().name.removeprefix("step_"))
    assert resumable >= steps_logged(run) - 1  # at most the last step is lost
    shutil.copytree(RunDirectory(run).latest.resolve(), run / "checkpoints" / ".partial-step_99")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "policy/lo')  # a torn line

    output = finished(start(arguments, tmp_path / "resumed.log"), 0)
    assert f"step {resumable + 1}/10" in output and f"step {resumable - 1}/10" not in output
    assert state(run)["status"] == "done"
    assert [step["step"] for step in values(run)] == list(range(1, 11))
    assert values(run) == values(undisturbed(1))
    assert not list((run / "checkpoints").glob(".partial-*"))
    assert RunDirectory(run).best.resolve().name == RunDirectory(undisturbed(1)).best.resolve().name
    for name in (
        "fixed_responses.parquet",
        "hf/model.safetensors",
        "exports/step_5/model.safetensors",
        "eval/step_4.json",
        "eval/step_10.json",
    ):
        assert (run / name).read_bytes() == (undisturbed(1) / name).read_bytes(), name


def test_two_ranks_stopped_by_a_signal_to_torchrun_continue_to_the_same_numbers(
    small: Small, undisturbed: Callable[[int], Path], tmp_path: Path
) -> None:
    run, arguments = tmp_path / "run", small.nsr(tmp_path / "run", "run.steps=10")
    started = start(arguments, tmp_path / "stopped.log", ranks=2)
    wait_until(lambda: steps_logged(run) >= 2, started, "step 2")
    started.process.send_signal(signal.SIGTERM)
    finished(started, 1)  # torchrun's own status
    assert state(run)["status"] == "stopped" and 2 <= state(run)["step"] < 10
    finished(start(arguments, tmp_path / "resumed.log", ranks=2), 0)
    assert state(run)["status"] == "done"
    assert values(run) == values(undisturbed(2))


def test_a_run_killed_in_its_last_evaluation_makes_up_for_it(small: Small, undisturbed: Callable[[int], Path], tmp_path: Path) -> None:
    """The last checkpoint comes before the evaluation, whose numbers and whose step's line are then still missing."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed(1), run, symlinks=True)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))
    (run / "eval/step_10.json").unlink()
    shutil.rmtree(run / "hf")
    RunDirectory(run).best.unlink()
    (run / "state.json").write_text((run / "state.json").read_text().replace('"done"', '"running"'))
    output = finished(start(small.nsr(run, "run.steps=10"), tmp_path / "resumed.log"), 0)
    assert "step 10/10" in output and "step 9/10" not in output
    assert values(run) == values(undisturbed(1))
    assert (run / "eval/step_10.json").read_bytes() == (undisturbed(1) / "eval/step_10.json").read_bytes()
    assert (run / "hf/model.safetensors").is_file()
    assert RunDirectory(run).best.resolve().name == RunDirectory(undisturbed(1)).best.resolve().name
