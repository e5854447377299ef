"""`python -m examples.quickstart`: data and model, the base, three objectives from it, and the page that compares them.

May import: megatron_nsr and the quickstart. Exit status: 0 done, 1 a run failed, 2 wrong input, 3 stopped by a signal.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from examples.quickstart.jobs import (
    BASE,
    OBJECTIVES,
    Job,
    Stopped,
    StopSignals,
    base_job,
    child_status,
    exit_status,
    objective_job,
    run_jobs,
)
from examples.quickstart.prepare import prepare
from examples.quickstart.progress import LiveProgress
from megatron_nsr.types import UserError

REPORT = "report"
CORES = 2  # runs side by side; each takes one


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the quickstart and returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False)
    wanted = (BASE, *OBJECTIVES, REPORT) if options.only is None else (options.only,)
    return exit_status(lambda signals: _quickstart(options.out, wanted, signals, console))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.quickstart", description="One tiny model, three objectives.")
    parser.add_argument("--only", choices=(BASE, *OBJECTIVES, REPORT), help="this part alone (the others must be done where it needs them)")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="where everything is written (%(default)s)")
    return parser


def _quickstart(out: Path, wanted: Sequence[str], signals: StopSignals, console: Console) -> int:
    base, objectives = base_job(out), [objective_job(name, out) for name in OBJECTIVES]
    if BASE not in wanted and REPORT not in wanted and not base.done:
        raise UserError(f"{base.run.path}: the base model is not there; run `python -m examples.quickstart --only base` first")
    stages = [[job for job in stage if job.name in wanted] for stage in ([base], objectives)]
    if any(not job.done for stage in stages for job in stage):
        prepare(out)
    for stage in stages:
        _train(stage, signals, console)
    return _report(out, [base, *objectives], signals, console) if REPORT in wanted else 0


def _train(jobs: Sequence[Job], signals: StopSignals, console: Console) -> None:
    """Runs those of the jobs that are not done yet."""
    todo = [job for job in jobs if not job.done]
    for job in jobs:
        state = f"log in {job.log}" if job in todo else f"done already, in {job.run.path}"
        console.print(f"{job.name}: {state}", soft_wrap=True)
    if todo:
        with LiveProgress(console) as progress:
            run_jobs(todo, CORES, signals, progress.update)


def _report(out: Path, jobs: Sequence[Job], signals: StopSignals, console: Console) -> int:
    """Writes the comparison page and prints the table; what is not done yet stops it."""
    for job in jobs:
        if not job.done:
            raise UserError(f"{job.run.path}: this run is not done, and the report compares all; run it with --only {job.name} first")
    page, runs = out / "report.html", [job.run.path for job in jobs]
    command = [sys.executable, "-m", "megatron_nsr", "report", *map(str, runs), "--out", str(page)]
    status = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    if signals.count:
        raise Stopped
    if status:
        print(f"error: the report ended with status {status}: {shlex.join(command)}", file=sys.stderr)
        return child_status(status)
    from megatron_nsr.evaluation.report import render_pass_at_k_table  # its plots take a second to import

    console.print(render_pass_at_k_table(runs))
    console.print(f"Report: {page}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
