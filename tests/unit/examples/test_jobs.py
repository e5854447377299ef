"""The driver with real child processes: order, width, failure, signals, skipping, and what it shows of a run."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from examples.quickstart.__main__ import main
from examples.quickstart.jobs import (
    OBJECTIVES,
    Job,
    JobFailed,
    Stopped,
    StopSignals,
    alone_in,
    base_job,
    end_orphans,
    explain,
    last_lines,
    objective_job,
    run_jobs,
)
from examples.quickstart.progress import LiveProgress, describe_step, latest_metrics, total_steps
from megatron_nsr.config_files import load_config
from megatron_nsr.observability.run_directory import RunDirectory
from megatron_nsr.observability.state import write_state
from megatron_nsr.types import UserError

ROOT = Path(__file__).parents[3]
# Ends with status 3 at SIGTERM, as a training run does, once it has said that it has started.
PATIENT = """
import signal, sys, time
from pathlib import Path
def stop(*_):
    Path(sys.argv[1]).write_text("stopped cleanly")
    sys.exit(3)
signal.signal(signal.SIGTERM, stop)
Path(sys.argv[1]).write_text("started")
time.sleep(600)
"""
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
# Runs one patient job as the quickstart does, and ends with the quickstart's status.
DRIVER = """
import sys
import threading
from pathlib import Path
from examples.quickstart.jobs import Job, Stopped, StopSignals, run_jobs
from megatron_nsr.observability.run_directory import RunDirectory
here = Path(sys.argv[1])
job = Job("patient", (sys.executable, "-c", sys.argv[2], str(here / "said")), RunDirectory(here / "run"), here / "log")
with StopSignals() as signals:
    try:
        run_jobs([job], 2, signals, lambda jobs: None)
    except Stopped:
        sys.exit(3)
"""


def job(directory: Path, name: str, program: str, *arguments: str) -> Job:
    return Job(name, (sys.executable, "-c", program, *arguments), RunDirectory(directory / name), directory / "logs" / f"{name}.log")


def run(*jobs: Job, at_once: int = 2, on_poll: Callable[[Sequence[Job]], None] = lambda jobs: None) -> None:
    with StopSignals() as signals:
        run_jobs(jobs, at_once, signals, on_poll)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


def test_all_jobs_run_each_with_its_own_log_and_one_thread(tmp_path: Path) -> None:
    jobs = [job(tmp_path, name, f"import os; print('{name}', os.environ['OMP_NUM_THREADS'])") for name in "abc"]
    run(*jobs)
    assert [last_lines(each.log) for each in jobs] == [["a 1"], ["b 1"], ["c 1"]]


def test_no_more_than_the_asked_number_run_side_by_side(tmp_path: Path) -> None:
    note = "import sys, time; f = open(sys.argv[1], 'a', 1); print('+', file=f); time.sleep(.3); print('-', file=f)"
    both = tmp_path / "both"
    run(*(job(tmp_path, name, note, str(both)) for name in "aab"), at_once=1)  # of the same name too
    assert both.read_text().split() == ["+", "-"] * 3


def test_a_failed_job_stops_the_others_and_is_named_with_its_status_and_log(tmp_path: Path) -> None:
    said = tmp_path / "said"
    patient = job(tmp_path, "patient", PATIENT, str(said))
    wait = "import os, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(.05)\nprint('no memory'); sys.exit(7)"
    failing, never = job(tmp_path, "failing", wait, str(said)), job(tmp_path, "never", "print('ran')")
    with pytest.raises(JobFailed, match="failing ended with status 7") as failure:
        run(patient, failing, never)
    assert (failure.value.job, last_lines(failing.log)) == (failing, ["no memory"])
    assert said.read_text() == "stopped cleanly"
    assert not never.log.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_job_which_ends_cleanly_and_the_status_is_3(tmp_path: Path, number: signal.Signals) -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path), PATIENT], cwd=ROOT)
    try:
        wait_for(lambda: (tmp_path / "said").exists())
        driver.send_signal(number)
        assert driver.wait(timeout=60) == 3
    finally:
        driver.kill()
    assert (tmp_path / "said").read_text() == "stopped cleanly"


def test_a_second_signal_kills_what_does_not_listen(tmp_path: Path) -> None:
    deaf, polls = job(tmp_path, "deaf", DEAF), 0

    def interrupt(_: Sequence[Job]) -> None:
        nonlocal polls
        if last_lines(deaf.log) == ["deaf"]:
            polls += 1
            os.kill(os.getpid(), signal.SIGTERM)
            signal.setitimer(signal.ITIMER_REAL, 0.5)

    previous = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        with pytest.raises(Stopped):
            run(deaf, on_poll=interrupt)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert polls == 1


def test_the_signal_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_only_a_run_whose_state_says_so_is_done(tmp_path: Path) -> None:
    base = base_job(tmp_path)
    assert not base.done
    write_state(base.run, "running", 10)
    assert not base.done
    write_state(base.run, "done", 1500)
    assert base.done


def test_every_job_starts_a_config_that_loads_and_stays_under_the_output_directory(tmp_path: Path) -> None:
    for each in (base_job(tmp_path), *(objective_job(name, tmp_path) for name in OBJECTIVES)):
        module, command, path, *overrides = each.command[2:]
        assert (module, command) == ("megatron_nsr", "train")
        config = load_config(path, overrides)
        assert config.run.dir == str(each.run.path) == str(tmp_path / each.name)
        assert config.objective.name == ("supervised" if each.name == "base" else each.name)
        paths = [config.model.path, config.data.train, *config.evaluation.benchmarks.values()]
        assert all(str(item).startswith(f"{tmp_path}/") for item in paths)


def test_by_default_the_jobs_run_what_the_configs_say_alone() -> None:
    out = Path("runs/quickstart")
    for each in (base_job(out), *(objective_job(name, out) for name in OBJECTIVES)):
        path, *overrides = each.command[4:]
        alone = [f"objective.name={each.name}"] if each.name in OBJECTIVES else []
        assert load_config(path, overrides) == load_config(path, alone)


def write_metrics(path: Path, *rows: object, torn: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)


def test_the_newest_complete_step_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert latest_metrics(path) is None
    write_metrics(path, torn='{"step": 1')
    assert latest_metrics(path) is None
    write_metrics(path, *({"step": step, "reward/correct_ratio": step / 1000} for step in range(1, 801)), torn='{"step": 801, "rew')
    latest = latest_metrics(path)
    assert latest is not None and latest["step"] == 800 and describe_step(latest) == "correct 0.80"


def test_a_supervised_step_shows_its_loss_and_an_unknown_one_nothing() -> None:
    assert describe_step({"step": 3, "supervised/loss": 0.2345}) == "loss 0.234"
    assert describe_step({"step": 3, "reward/correct_ratio": None}) == ""


def test_the_bar_shows_name_step_of_steps_and_what_was_reached(tmp_path: Path) -> None:
    nsr = objective_job("nsr", tmp_path)
    assert total_steps(nsr.run) is None
    write_metrics(nsr.run.metrics, {"step": 40, "reward/correct_ratio": 0.5})
    nsr.run.config.write_text((ROOT / "configs" / "quickstart.yaml").read_text())
    screen = io.StringIO()
    with LiveProgress(Console(file=screen, width=100)) as progress:
        progress.update([nsr])
    assert "nsr" in screen.getvalue() and "40/100" in screen.getvalue() and "correct 0.50" in screen.getvalue()


def test_an_objective_without_its_base_is_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "nsr", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "base") in error and "--only base" in error


def test_a_report_of_unfinished_runs_is_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("base", "psr"):
        write_state(RunDirectory(tmp_path / name), "done", 1)
    assert main(["--only", "report", "--out", str(tmp_path)]) == 2
    assert f"{tmp_path / 'nsr'}: this run is not done" in capsys.readouterr().err


def test_runs_that_are_done_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("base", *OBJECTIVES):
        write_state(RunDirectory(tmp_path / name), "done", 1)
    assert main(["--only", "base", "--out", str(tmp_path)]) == 0
    assert main(["--only", "psr", "--out", str(tmp_path)]) == 0
    assert "base: done already" in capsys.readouterr().out
    assert not (tmp_path / "logs").exists()


def test_a_broken_state_file_is_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="not a state file"):
        _ = base_job(tmp_path).done
    assert main(["--only", "base", "--out", str(tmp_path)]) == 2
    assert "not a state file" in capsys.readouterr().err


def test_a_failure_is_explained_by_the_end_of_the_log_the_status_and_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = job(tmp_path, "nsr", "print('\\n'.join(map(str, range(100)))); raise SystemExit('out of memory')")
    with pytest.raises(JobFailed) as failure:
        run(failing)
    explain(failure.value)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:20] == [*map(str, range(81, 100)), "out of memory"]
    assert "nsr ended with status 1" in lines[20] and str(failing.log) in lines[20]
    assert sys.executable in lines[21]


def test_it_starts_as_a_module_and_names_its_parts() -> None:
    result = subprocess.run([sys.executable, "-m", "examples.quickstart", "--only", "ppo"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "invalid choice: 'ppo'" in result.stderr and "w_reinforce" in result.stderr


def test_what_a_killed_command_left_running_ends_before_its_job_starts_again(tmp_path: Path) -> None:
    said = tmp_path / "said"
    patient = job(tmp_path, "patient", PATIENT, str(said))
    orphan = subprocess.Popen(patient.command, start_new_session=True)
    try:
        wait_for(lambda: said.exists() and said.read_text() == "started")
        threading.Thread(target=orphan.wait, daemon=True).start()  # somebody must collect it: here it is our child, and no orphan's
        end_orphans(patient)
        assert said.read_text() == "stopped cleanly"
    finally:
        orphan.kill()


def test_one_command_works_in_a_directory_at_a_time(tmp_path: Path) -> None:
    with alone_in(tmp_path), pytest.raises(UserError, match="another command is at work"), alone_in(tmp_path):
        pass
    with alone_in(tmp_path):
        pass


def test_a_finished_bar_gives_way_to_a_line_where_there_are_many(tmp_path: Path) -> None:
    nsr = objective_job("nsr", tmp_path)
    write_metrics(nsr.run.metrics, {"step": 100, "reward/correct_ratio": 0.5})
    nsr.run.config.write_text((ROOT / "configs" / "quickstart.yaml").read_text())
    screen = io.StringIO()
    with LiveProgress(Console(file=screen, width=100), keep_finished=False) as progress:
        progress.update([nsr])
        progress.update([nsr])
    assert screen.getvalue().count("nsr: 100 steps, correct 0.50") == 1 and "100/100" not in screen.getvalue()
