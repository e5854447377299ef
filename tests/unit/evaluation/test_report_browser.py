"""The report as a browser shows it: no complaint, no request, and readable on a desk, on a telephone, in the dark and on paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_nsr.evaluation.report import write_report
from tests.browser import Chromium
from tests.unit.evaluation.test_report import ATTACK, make_run

DESK, TELEPHONE, PAPER = 1280, 400, 794  # CSS pixels; the last is A4
SMALLEST_TEXT = 11  # pixels on a screen

# What a reader would stumble over, as {kind: [where, ...]}. Everything that can be opened is open.
READ = """
(() => {
  document.querySelectorAll("details").forEach(details => details.open = true);
  const width = document.documentElement.clientWidth, found = {};
  const note = (kind, element, value) => (found[kind] ??= []).push(`${element.textContent.trim().slice(0, 40)}: ${value}`);
  const shown = element => element.checkVisibility() && element.getBoundingClientRect().width > 0;
  const luminance = color => {
    const parts = color.match(/[\\d.]+/g).slice(0, 3).map(Number).map(x => x / 255);
    const [r, g, b] = parts.map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = element => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if (color !== "rgba(0, 0, 0, 0)") return color;
    }
    return "rgb(255, 255, 255)";
  };
  const contrast = (one, other) => {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };

  if (document.documentElement.scrollWidth > width) found["wider than the window"] = [document.documentElement.scrollWidth];
  const texts = [...document.querySelectorAll("body *")].filter(element => shown(element) && !element.closest("svg")
    && [...element.childNodes].some(node => node.nodeType === Node.TEXT_NODE && node.data.trim()));
  for (const element of texts) {
    const style = getComputedStyle(element);
    if (parseFloat(style.fontSize) < %(smallest)s) note("small", element, style.fontSize);
    const least = element.matches(".key") ? 3 : 4.5;  // WCAG 2.2, 1.4.11 and 1.4.3
    const ratio = contrast(style.color, background(element));
    if (ratio < least) note("faint", element, ratio.toFixed(2));
    const box = element.getBoundingClientRect();
    if (!element.closest(".scroll") && (box.right > width + 1 || box.left < -1)) note("cut off", element, box.right);
  }
  const pictures = [...document.querySelectorAll("svg")].filter(shown);
  for (const svg of pictures) {
    const frame = svg.getBoundingClientRect();
    if (frame.right > width + 1) note("cut off", svg.closest("figure"), frame.right);
    const labels = [...svg.querySelectorAll("text")].map(text => ({text, box: text.getBoundingClientRect()}));
    labels.forEach(({text, box}, index) => {
      const size = parseFloat(getComputedStyle(text).fontSize) * Math.hypot(text.getScreenCTM().a, text.getScreenCTM().b);
      if (size < %(smallest)s) note("small", text, size);
      if (contrast(getComputedStyle(text).fill, background(svg)) < 4.5) note("faint", text, getComputedStyle(text).fill);
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
        note("outside its picture", text, svg.ariaLabel);
      for (const other of labels.slice(index + 1))
        if (box.left < other.box.right && other.box.left < box.right && box.top < other.box.bottom && other.box.top < box.bottom)
          note("overlapping", text, `${other.text.textContent} in ${svg.ariaLabel}`);
    });
  }
  const scheme = getComputedStyle(document.body).backgroundColor;
  return {found, pictures: pictures.length, texts: texts.length, scheme, body: document.body.innerText};
})()
"""


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


def read(chromium: Chromium, page: Path, width: int, *, dark: bool = False, media: str = "screen") -> dict[str, Any]:
    """What a reader of the page finds; it must not complain or ask for anything but itself."""
    visit = chromium.visit(page, width=width, dark=dark, media=media, script=READ % {"smallest": SMALLEST_TEXT if media == "screen" else 8})
    assert visit.complaints == []
    assert visit.requests == [page.as_uri()]
    return dict(visit.result)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [DESK, TELEPHONE])
def test_it_is_readable(chromium: Chromium, page: Path, width: int, dark: bool) -> None:
    seen = read(chromium, page, width, dark=dark)
    assert seen["found"] == {}
    assert seen["pictures"] > 20 and seen["texts"] > 200
    assert seen["scheme"] == ("rgb(18, 22, 27)" if dark else "rgb(244, 245, 247)")


def test_it_prints_on_paper_light_and_whole(chromium: Chromium, page: Path) -> None:
    seen = read(chromium, page, PAPER, dark=True, media="print")
    assert seen["found"] == {} and seen["scheme"] == "rgb(255, 255, 255)"
    assert ATTACK in seen["body"]


def test_a_response_is_text_to_the_browser_too(chromium: Chromium, page: Path) -> None:
    script = "({scripts: document.scripts.length, italics: document.querySelectorAll('i').length})"
    visit = chromium.visit(page, width=DESK, script=script)
    assert visit.result == {"scripts": 0, "italics": 0}
    assert ATTACK in read(chromium, page, DESK)["body"]


def test_a_run_with_nothing_is_readable(chromium: Chromium, tmp_path: Path) -> None:
    write_report([make_run(tmp_path, "new", "nsr", steps=0)], tmp_path / "report.html")
    seen = read(chromium, tmp_path / "report.html", TELEPHONE)
    assert seen["found"] == {} and seen["pictures"] == 0
    assert "no training step (metrics.jsonl)" in seen["body"] and "no evaluation (eval/step_N.json)" in seen["body"]


def test_the_check_finds_what_it_is_for(chromium: Chromium, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    paragraphs = [("font-size: 9px", "small"), ("color: #bbb", "faint"), ("width: 3000px", "wide")]
    labels = [(2, "one"), (9, "two"), (80, "outside")]
    bad.write_text(
        '<body style="background: #fff">'
        + "".join(f'<p style="{style}">{text}</p>' for style, text in paragraphs)
        + '<svg width="99" height="40" aria-label="labels">'
        + "".join(f'<text x="{x}" y="20">{text}</text>' for x, text in labels)
        + '</svg><script>console.log("talk"); fetch("http://127.0.0.1:9/")</script>'
    )
    visit = chromium.visit(bad, width=DESK, script=READ % {"smallest": SMALLEST_TEXT})
    assert visit.result["found"].keys() >= {"small", "faint", "wider than the window", "cut off", "overlapping", "outside its picture"}
    assert any("talk" in complaint for complaint in visit.complaints) and "http://127.0.0.1:9/" in visit.requests
