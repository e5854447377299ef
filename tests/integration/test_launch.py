"""`launch --executor local` on two real ranks: what it exits with, and what it says."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import psutil
import pytest

from examples.quickstart.prepare import prepare
from tests.integration.small_run import Small, Started, finished, start, state, steps_logged, wait_until

RANKS = ["--executor", "local", "--uncommitted", "cluster.processes_per_node=2"]


def begin(small: Small, run: Path, *overrides: str) -> Started:
    """The small supervised run, without an evaluation and so without an engine."""
    train = small.supervised(run, "evaluation.benchmarks.puzzle=null", "optimizer.schedule=constant", "checkpoint.every=100", *overrides)
    return start(["launch", train[1], *RANKS, *train[2:]], run.with_suffix(".log"))


def kill_rank(home: Path, rank: int) -> None:
    """As the system does when memory runs out."""
    (pid,) = home.glob("megatron_nsr/*/pid")
    ranks = psutil.Process(int(pid.read_text())).children()
    next(process for process in ranks if process.environ().get("RANK") == str(rank)).kill()


def test_the_exit_status_is_the_job_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path, corpus_size=3000)
    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path / "killed"))
    small, run = Small(tmp_path), tmp_path / "run"
    killed = begin(small, run, "run.steps=500")
    wait_until(lambda: steps_logged(run) >= 2, killed, "two steps were made")
    kill_rank(tmp_path / "killed", 1)
    output = finished(killed, 1)
    assert "exit status 1" in output and "Signal 9 (SIGKILL)" in output  # torchrun's last words, from the log

    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path / "home"))
    stopped = begin(small, run, "run.steps=500")
    wait_until(lambda: steps_logged(run) >= 4, stopped, "four steps were made")
    stopped.process.send_signal(signal.SIGTERM)
    output = finished(stopped, 3)
    assert "stopping: the run writes a checkpoint first" in output and f"{run}: stopped at step" in output

    steps = state(run)["step"] + 2
    output = finished(begin(small, run, f"run.steps={steps}"), 0)
    assert f"{run}: done at step {steps}" in output and steps_logged(run) == steps
    assert len(json.loads((run / "environment.json").read_text())["git"]["commit"]) == 40

    output = finished(begin(small, tmp_path / "wrong", "data.train=nowhere.jsonl"), 2)
    assert output.splitlines()[-1].startswith("megatron-nsr: data.train=nowhere.jsonl: no such file") and "ChildFailedError" not in output
