"""The report as a browser shows it: no complaint, no request, and readable on a desk, on a telephone, in the dark and on paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_nsr.evaluation.report import write_report
from tests.browser import Chromium
from tests.readable import read_page, reading_script
from tests.unit.evaluation.test_report import ATTACK, make_run
from tests.unit.evaluation.test_report_comparable import evaluated

DESK, TELEPHONE, PAPER = 1280, 400, 794  # CSS pixels; the last is A4


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    with Chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs, one of them with a long name, another short and without samples; three evaluated several times."""
    root = tmp_path_factory.mktemp("pages")
    runs = [
        make_run(root, "base", "supervised", steps=60, evaluated=[60]),
        make_run(root, "psr", "psr", steps=60, evaluated=[0, 8, 20], sampled=True, skill=2),
        make_run(root, "nsr_$a$_<i>", "nsr", steps=60, evaluated=[0, 8, 20], sampled=True, skill=5),
        make_run(root, "w_reinforce_with_a_name_that_says_everything_of_the_run", "w_reinforce", steps=3, evaluated=[2]),
    ]
    write_report(runs, root / "report.html")
    return root / "report.html"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [DESK, TELEPHONE])
def test_it_is_readable(chromium: Chromium, page: Path, width: int, dark: bool) -> None:
    seen = read_page(chromium, page, width, dark=dark)
    assert seen["found"] == {}
    assert seen["pictures"] > 20 and seen["texts"] > 200
    assert seen["scheme"] == ("rgb(18, 22, 27)" if dark else "rgb(244, 245, 247)")


# Of every cell that reaches out of the window: its text; and how many cells there are, each with its column's name before it.
CELLS = """
(() => {
  document.querySelectorAll("details").forEach(details => details.open = true);
  const cells = [...document.querySelectorAll("td")];
  const outside = cells.filter(cell => cell.getBoundingClientRect().right > innerWidth || cell.scrollWidth > cell.clientWidth);
  const named = cells.filter(cell => cell.colSpan > 1 || getComputedStyle(cell, "::before").content.length > 2);
  return {cells: cells.length, outside: outside.map(cell => cell.textContent), named: named.length};
})()
"""


def test_on_a_telephone_every_cell_of_a_table_is_inside_the_window_under_its_column_s_name(chromium: Chromium, page: Path) -> None:
    seen = chromium.visit(page, width=TELEPHONE, script=CELLS).result
    assert seen["outside"] == [] and seen["cells"] == seen["named"] > 200


def test_on_a_desk_no_table_of_two_benchmarks_has_to_be_scrolled(chromium: Chromium, tmp_path: Path) -> None:
    runs = [evaluated(tmp_path, "base"), evaluated(tmp_path, "longer", other="validation")]
    for run in runs:
        (run / "metrics.jsonl").unlink()
    write_report(runs, tmp_path / "report.html")
    script = "[...document.querySelectorAll('.scroll')].map(each => each.scrollWidth - each.clientWidth)"
    assert set(chromium.visit(tmp_path / "report.html", width=DESK, script=script).result) == {0}


def test_it_prints_on_paper_light_and_whole(chromium: Chromium, page: Path) -> None:
    seen = read_page(chromium, page, PAPER, dark=True, media="print")
    assert seen["found"] == {} and seen["scheme"] == "rgb(255, 255, 255)"
    assert ATTACK in seen["body"]


def test_a_response_is_text_to_the_browser_too(chromium: Chromium, page: Path) -> None:
    script = "({scripts: document.scripts.length, italics: document.querySelectorAll('i').length})"
    visit = chromium.visit(page, width=DESK, script=script)
    assert visit.result == {"scripts": 0, "italics": 0}
    assert ATTACK in read_page(chromium, page, DESK)["body"]


def test_a_run_with_nothing_is_readable(chromium: Chromium, tmp_path: Path) -> None:
    write_report([make_run(tmp_path, "new", "nsr", steps=0)], tmp_path / "report.html")
    seen = read_page(chromium, tmp_path / "report.html", TELEPHONE)
    assert seen["found"] == {} and seen["pictures"] == 0
    assert "no training step (metrics.jsonl)" in seen["body"] and "no evaluation (eval/step_N.json)" in seen["body"]


def test_the_check_finds_what_it_is_for(chromium: Chromium, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    paragraphs = [("font-size: 9px", "small"), ("color: #bbb", "faint"), ("width: 3000px", "wide")]
    labels = [(2, "one"), (9, "two"), (80, "outside")]
    bad.write_text(
        '<body style="background: #fff">'
        + '<div class="scroll" style="overflow-x: auto"><span style="margin-left: 2000px">unseen</span></div>'
        + "".join(f'<p style="{style}">{text}</p>' for style, text in paragraphs)
        + '<svg width="99" height="40" aria-label="labels">'
        + "".join(f'<text x="{x}" y="20">{text}</text>' for x, text in labels)
        + '</svg><script>console.log("talk"); fetch("http://127.0.0.1:9/")</script>'
    )
    visit = chromium.visit(bad, width=DESK, script=reading_script())
    assert visit.result["found"].keys() >= {"small", "faint", "wider than the window", "cut off", "overlapping", "outside its picture"}
    assert any(text.startswith("unseen") for text in visit.result["found"]["cut off"])
    assert any("talk" in complaint for complaint in visit.complaints) and "http://127.0.0.1:9/" in visit.requests
