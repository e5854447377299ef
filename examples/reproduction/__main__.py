"""`python -m examples.reproduction WHAT`: bases, search, comparison, and the page with their numbers.

May import: megatron_nsr, the quickstart and the reproduction. Exit status: 0 done, 1 a run failed, 2 wrong input, 3 stopped by a signal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from examples.quickstart.jobs import Job, StopSignals, alone_in, exit_status, run_jobs
from examples.quickstart.progress import LiveProgress
from examples.reproduction.comparison import Comparison
from examples.reproduction.cost import Cost
from examples.reproduction.figures import write_figures
from examples.reproduction.page import render
from examples.reproduction.plan import Scale, base_runs, comparison_runs, jobs_of, search_runs
from examples.reproduction.results import Results, full_curve, read_base, read_candidates, read_method, read_results, write_results
from examples.reproduction.scales import CANDIDATES, SCALES
from examples.reproduction.search import chosen_rates
from megatron_nsr.observability.environment import describe_environment
from megatron_nsr.observability.run_directory import write_atomic, write_json

DOCS = Path(__file__).parents[2] / "docs"
PUBLISHED = {"one": "reproduction", "full": "reproduction_full"}  # tiny is a rehearsal, and never enters docs/
CANDIDATES_FILE = "reproduction_candidates"
CORES = 2  # runs side by side; each takes one


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is asked for and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m examples.reproduction", description="The paper's comparison on two CPU cores.")
    parser.add_argument("what", choices=(*SCALES, "candidates", "page"), help="a scale, the bases of candidate puzzles, or the page alone")
    parser.add_argument("--out", type=Path, help="where the runs are written (runs/reproduction/WHAT)")
    parser.add_argument("--seeds", type=int, help="use only the first so many seeds of the scale: less time, wider intervals")
    options = parser.parse_args(arguments)
    if options.seeds is not None and options.seeds < 1:
        parser.error(f"argument --seeds: {options.seeds} is no number of seeds; 1 is the least")
    out = options.out or Path("runs/reproduction") / options.what
    return exit_status(lambda signals: _work(options.what, out, options.seeds, signals, Console(highlight=False)))


def _work(what: str, out: Path, seeds: int | None, signals: StopSignals, console: Console) -> int:
    if what == "page":
        _publish(console)
        return 0
    with alone_in(out):
        if what == "candidates":
            _candidates(out, signals, console)
        else:
            scale = SCALES[what]
            _compare(replace(scale, seeds=scale.seeds[:seeds]), out, signals, console)
    return 0


def _compare(scale: Scale, out: Path, signals: StopSignals, console: Console) -> None:
    """Everything of a scale that is not done yet, then its results."""
    cost = Cost(out)
    bases = base_runs(scale, out)
    _prepare(scale, out, bases[-1].job)
    _train(jobs_of(bases), cost, signals, console)
    searched = [] if scale.rates is not None else search_runs(scale, out)
    _train(jobs_of(searched), cost, signals, console)
    search = tuple(read_method(run, "validation") for run in searched)
    compared = comparison_runs(scale, out, chosen_rates(search) if scale.rates is None else scale.rates)
    _train(jobs_of(compared), cost, signals, console)
    cost.write()
    results = Results(
        settings=scale.describe(),
        bases=tuple(read_base(run) for run in bases),
        runs=tuple(read_method(run) for run in compared),
        search=search,
        cost=cost.seconds,
        environment=describe_environment(),
    )
    write_results(out / "results.json", results)
    if scale.name in PUBLISHED:
        write_results(DOCS / "results" / f"{PUBLISHED[scale.name]}.json", results)
        _publish(console)
    else:
        _write_page(out, results, None, [])
        console.print(f"Page: {out / 'reproduction.md'}", soft_wrap=True)


def _prepare(scale: Scale, out: Path, last_base: Job) -> None:
    if not last_base.done:
        scale.task.prepare(out, scale.corpus_size)


def _train(jobs: Sequence[Job], cost: Cost, signals: StopSignals, console: Console) -> None:
    """Runs those of the jobs that are not done yet."""
    todo = [job for job in jobs if not job.done]
    console.print(f"{len(todo)} of {len(jobs)} runs to do" if todo else f"all {len(jobs)} runs done already")
    if todo:
        with LiveProgress(console, keep_finished=False) as progress:

            def look(started: Sequence[Job]) -> None:
                progress.update(started)
                cost.note()

            try:
                run_jobs(todo, CORES, signals, look)
            finally:
                cost.write()


def _candidates(out: Path, signals: StopSignals, console: Console) -> None:
    """Pre-trains a base of every candidate puzzle and judges it on validation problems."""
    cost, rows, jobs = Cost(out), [], []
    for scale in CANDIDATES:
        [run] = base_runs(scale, out / scale.name, "validation")
        _prepare(scale, out / scale.name, run.job)
        jobs.append((scale, run))
    # Their runs are called alike, and a name is what the progress tells them apart by.
    _train([replace(run.job, name=scale.name) for scale, run in jobs], cost, signals, console)
    for scale, run in jobs:
        evaluation = read_base(run, "validation").evaluation
        rows.append(scale.describe() | {"pass_at_k": full_curve(evaluation), "entropy": evaluation.entropy})
    write_json(DOCS / "results" / f"{CANDIDATES_FILE}.json", {"candidates": rows, "environment": describe_environment()})
    _publish(console)


def _publish(console: Console) -> None:
    """Writes docs/reproduction.md and its images from docs/results."""
    one, full = (_published(name) for name in PUBLISHED.values())
    path = DOCS / "results" / f"{CANDIDATES_FILE}.json"
    _write_page(DOCS, one, full, read_candidates(path) if path.is_file() else [])
    console.print(f"Page: {DOCS / 'reproduction.md'}", soft_wrap=True)


def _published(name: str) -> Results | None:
    path = DOCS / "results" / f"{name}.json"
    return read_results(path) if path.is_file() else None


def _write_page(directory: Path, one: Results | None, full: Results | None, candidates: Sequence[dict[str, Any]]) -> None:
    for prefix, results in zip(PUBLISHED.values(), (one, full), strict=True):
        if results:
            write_figures(Comparison(results), directory / "images", prefix)
    write_atomic(directory / "reproduction.md", render(one, full, candidates))


if __name__ == "__main__":
    sys.exit(main())
