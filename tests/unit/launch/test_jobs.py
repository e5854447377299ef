"""`job status|cancel` of a job of this machine, and the last words of one that failed."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_nsr.launch.command import cancel, show_status
from megatron_nsr.launch.job import JobDirectory, JobRecord, job_directory
from megatron_nsr.launch.waiting import exit_status
from megatron_nsr.observability.run_directory import write_json

NOTE = "E1122 03:06:27.347000 11213 .venv/lib/python3.11/site-packages/torch/distributed/elastic/multiprocessing/api.py:1002] failed"
TRACEBACK = "Traceback (most recent call last):"
TORCHRUN = [
    NOTE,
    TRACEBACK,
    '  File "<frozen runpy>", line 198, in _run_module_as_main',
    "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ",
    "=====",
    "megatron_nsr FAILED",
    "  traceback : Signal 9 (SIGKILL) received by PID 7",
    "=====",
]
WRONG = "megatron-nsr: data.train=nowhere.jsonl: no such file"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobDirectory:
    """A job of this machine that was launched, and no more."""
    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path))
    directory = job_directory("nsr_17")
    directory.path.mkdir(parents=True)
    write_json(directory.record, {"id": "nsr_17", "executor": "local", "run": str(tmp_path / "run"), "commit": None, "uncommitted": False})
    return directory


@pytest.fixture
def sleeping(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose command line ends with the test's parameter."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", request.param])
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("sleeping", ["/home/nsr_17/config.yaml"], indirect=True)
def test_a_job_that_runs_is_cancelled_by_its_process(
    job: JobDirectory, sleeping: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    job.pid.write_text(f"{sleeping.pid}\n")
    show_status("nsr_17")
    cancel("nsr_17")
    assert sleeping.wait() == -signal.SIGTERM
    cancel("nsr_17")
    assert capsys.readouterr().out.splitlines() == [
        "nsr_17: RUNNING",
        f"{job.path.parents[1] / 'run'}: no state yet",
        "nsr_17: told to stop after a checkpoint",
        "nsr_17: already ended",
    ]


@pytest.mark.parametrize("sleeping", ["another program"], indirect=True)
def test_another_process_that_got_the_number_is_left_alone(
    job: JobDirectory, sleeping: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    job.pid.write_text(f"{sleeping.pid}\n")
    show_status("nsr_17")
    cancel("nsr_17")
    shown = capsys.readouterr().out
    assert "nsr_17: ENDED\n" in shown and "nsr_17: already ended\n" in shown
    assert sleeping.poll() is None


def test_a_job_that_never_started_has_ended(job: JobDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    show_status("nsr_17")
    assert "nsr_17: ENDED\n" in capsys.readouterr().out


def ended(job: JobDirectory, status: int, log: list[str], *, followed: bool = False) -> int:
    job.log.write_text("\n".join(log))
    job.exit_status.write_text(f"{status}\n")
    return exit_status(job, JobRecord("nsr_17", "local", str(job.path / "run"), None, False), "FAILED", followed=followed)


@pytest.mark.parametrize("followed", [False, True])
def test_wrong_input_is_the_last_line_and_torchrun_says_nothing(
    job: JobDirectory, followed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(job, 2, [WRONG, *TORCHRUN], followed=followed) == 2
    assert capsys.readouterr().err.splitlines() == [WRONG]


def test_a_rank_s_own_traceback_is_shown_without_torchrun_s(job: JobDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    failed = [line.replace("Signal 9 (SIGKILL) received by PID 7", "To enable traceback see") for line in TORCHRUN]
    assert ended(job, 1, ["step 3", TRACEBACK, "RuntimeError: too far", *failed]) == 1
    assert capsys.readouterr().err.splitlines() == ["step 3", TRACEBACK, "RuntimeError: too far"]


def test_of_ranks_that_were_killed_torchrun_tells(job: JobDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    lost = [TRACEBACK, "RuntimeError: connection closed by peer"]  # of another rank
    assert ended(job, 1, [*lost, *TORCHRUN]) == 1
    assert capsys.readouterr().err.splitlines() == [*lost, *TORCHRUN[4:]]
