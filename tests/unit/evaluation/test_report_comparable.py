"""The report sets side by side only what was measured alike, and says so where it was not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from megatron_nsr.evaluation.report import render_pass_at_k_table
from megatron_nsr.evaluation.report_data import load_runs
from megatron_nsr.evaluation.report_figures import heldout_entropy_figures
from megatron_nsr.evaluation.report_tables import summary_tables
from megatron_nsr.observability.run_directory import RunDirectory, write_json
from tests.unit.evaluation.test_report import evaluation, make_run


def evaluated(root: Path, name: str, *, other: str | None = None, first: str = "p0") -> Path:
    """A run with one evaluation on `puzzle`. other: a further benchmark; first: the id of the first problem."""
    run = make_run(root, name, "nsr", steps=2)
    result = evaluation(2, len(name))
    result["benchmarks"]["puzzle"]["problems"][0]["id"] = first
    if other:
        result["benchmarks"][other] = json.loads(json.dumps(result["benchmarks"]["puzzle"]))
    write_json(RunDirectory(run).evaluation(2), result)
    return run


@pytest.mark.parametrize(("other", "first", "compared"), [(None, "p0", True), (None, "q", False), ("validation", "p0", False)])
def test_entropies_are_subtracted_only_if_the_prompts_are_the_same(tmp_path: Path, other: str | None, first: str, compared: bool) -> None:
    runs = load_runs([evaluated(tmp_path, "base"), evaluated(tmp_path, "longer", other=other, first=first)])
    table = summary_tables(runs, ["puzzle"] if other is None else ["puzzle", "validation"])[0]
    assert table.columns[-1] == "held-out entropy, nats"
    cell = table.rows[1][1][-1]
    assert (cell.value, cell.notes) == ("0.900", ("-0.200",) if compared else ())
    (figure,) = heldout_entropy_figures(runs)
    assert ("Measured on different prompts, so levels do not compare between: base | longer." in figure.caption) != compared


def test_entropy_without_problem_ids_is_compared_with_nothing(tmp_path: Path) -> None:
    paths = [evaluated(tmp_path, "base"), evaluated(tmp_path, "longer")]
    for path in paths:
        result = json.loads(RunDirectory(path).evaluation(2).read_text())
        del result["benchmarks"]["puzzle"]["problems"]
        write_json(RunDirectory(path).evaluation(2), result)
    runs = load_runs(paths)
    assert summary_tables(runs, ["puzzle"])[0].rows[1][1][-1].notes == ()
    assert "different prompts" in heldout_entropy_figures(runs)[0].caption


def test_entropy_stands_once_and_a_benchmark_lists_the_runs_that_have_it(tmp_path: Path) -> None:
    paths = [evaluated(tmp_path, "base"), evaluated(tmp_path, "longer", other="validation")]
    every, puzzle, validation = summary_tables(load_runs(paths), ["puzzle", "validation"])
    assert [table.columns.count("held-out entropy, nats") for table in (every, puzzle, validation)] == [1, 0, 0]
    assert [[run.name for run, _ in table.rows] for table in (every, puzzle, validation)] == [["base", "longer"]] * 2 + [["longer"]]
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_pass_at_k_table(paths))
    assert (console.export_text(clear=False).count("1.100"), console.export_text().count("0.900")) == (1, 1)
