"""The report sets side by side only what was measured alike, and says so where it was not."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_nsr.evaluation import report_figures
from megatron_nsr.evaluation.report import render_pass_at_k_table
from megatron_nsr.evaluation.report_data import load_runs
from megatron_nsr.evaluation.report_figures import heldout_entropy_figures, pass_at_k_figures
from megatron_nsr.evaluation.report_panels import learning_figures, sign_figures
from megatron_nsr.evaluation.report_tables import summary_tables
from megatron_nsr.observability.plots import Line, color_of, css_color
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
    console = Console(width=100, record=True, file=StringIO())
    console.print(render_pass_at_k_table(paths))
    assert (console.export_text(clear=False).count("1.100"), console.export_text().count("0.900")) == (1, 1)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Sequence[Line], object]]:
    """Of each panel against training steps that is made: its lines and the limits of its axis."""
    panels: dict[str, tuple[Sequence[Line], object]] = {}
    whole = report_figures.line_panel

    def record(title: str, caption: str, lines: Sequence[Line], **settings: Any) -> report_figures.ReportFigure:
        if settings["x_label"] == "training step":
            panels[title] = lines, settings["x_limits"]
        return whole(title, caption, lines, **settings)

    monkeypatch.setattr(report_figures, "line_panel", record)
    return panels


def test_only_a_run_that_did_not_train_is_a_level_and_all_panels_have_the_same_axis(
    tmp_path: Path, drawn: dict[str, tuple[Sequence[Line], object]]
) -> None:
    runs = load_runs(
        [
            make_run(tmp_path, "base", "nsr", steps=0, evaluated=[0]),
            make_run(tmp_path, "once", "psr", steps=12, evaluated=[12]),
            make_run(tmp_path, "often", "nsr", steps=20, evaluated=[0, 8, 20]),
        ]
    )
    figures = [*pass_at_k_figures(runs, "puzzle"), *heldout_entropy_figures(runs), *learning_figures(runs)]
    for title in ("puzzle over training", "Held-out entropy"):
        lines = {line.label.partition(",")[0]: line for line in drawn[title][0]}
        assert (list(lines["base"].x), lines["base"].marker) == ([0, 20], "")
        assert (list(lines["once"].x), list(lines["often"].x)) == ([12], [0, 8, 20]) and lines["once"].marker
        (caption,) = [figure.caption for figure in figures if figure.title == title]
        assert "Level, without markers: base, of none of these steps." in caption
    assert len(drawn) > 6 and {limits for _, limits in drawn.values()} == {(0, 20)}


def test_the_same_curve_of_two_runs_shows_both_and_says_so(tmp_path: Path) -> None:
    names = ("one", "two", "another")
    runs = load_runs([make_run(tmp_path, name, "nsr", steps=3, skill=3 + (name == "another")) for name in names])
    (figure,) = [figure for figure in learning_figures(runs) if figure.title == "Correct responses"]
    assert figure.caption.endswith("Drawn wider, because another line covers it: one.")
    widths = {name: stroke_widths(figure.svg, color_of(index)) for index, name in enumerate(names)}
    assert widths["one"] - widths["two"] and max(widths["one"]) >= 2 * max(widths["two"]) and widths["two"] == widths["another"]


def stroke_widths(svg: str, color: str) -> set[float]:
    """Of the lines of a colour, as the style says it; one without a width has 1."""
    styles = re.findall(r'style="(fill: none; stroke: [^"]*)"', svg)
    widths = (re.search(r"stroke-width: ([0-9.]+)", style) for style in styles if css_color(color) in style)
    return {float(width[1]) if width else 1.0 for width in widths}


@pytest.mark.parametrize(("count", "fills"), [(3, 3), (4, 0)])
def test_bands_are_filled_for_up_to_three_runs_only(tmp_path: Path, count: int, fills: int) -> None:
    runs = load_runs([make_run(tmp_path, f"run{index}", "nsr", steps=1, evaluated=[1], skill=index + 2) for index in range(count)])
    figure = pass_at_k_figures(runs, "puzzle")[0]
    assert figure.svg.count("fill-opacity: 0.13") == fills
    assert ("Of each band the two edges are drawn, thin, in the run's colour." in figure.caption) == (not fills)


def test_a_caption_explains_only_the_lines_that_are_there(tmp_path: Path) -> None:
    captions = {figure.title: figure.caption for figure in sign_figures(load_runs([make_run(tmp_path, "run", "nsr", steps=2)]))}
    assert captions["Truncated responses"].startswith("Dashed: wrong ones. reward/truncated_ratio_nsr: ")
    assert captions["Loss"].startswith("Solid: correct responses; dashed: wrong ones. ")


def test_the_vote_s_caption_says_which_answers_count_as_one(tmp_path: Path) -> None:
    result = evaluation(1, 4)
    result["benchmarks"]["puzzle"] |= {"cons_at_k": {"1": 0.4, "16": 0.6}}
    run = make_run(tmp_path, "run", "nsr", steps=1)
    write_json(RunDirectory(run).evaluation(1), result)
    (figure,) = [figure for figure in pass_at_k_figures(load_runs([run]), "puzzle") if figure.title.startswith("cons@k")]
    for words in ("All correct answers count as one", "equal numbers or texts", "Samples without an answer do not vote"):
        assert words in figure.caption
