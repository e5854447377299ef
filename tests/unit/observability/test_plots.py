"""Figures: self-contained, reproducible SVG that shows every series it was given."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron_nsr.observability.plots import Line, color_of, line_figure, panels_figure, stacked_bars_figure, to_svg, write_png

CURVE = Line("a", [1, 2, 4], [0.1, 0.2, 0.3], color_of(1), low=[0.0, 0.1, 0.2], high=[0.2, 0.3, 0.4])


def draw(*lines: Line, y_scale: str = "linear") -> str:
    return to_svg(line_figure(lines, x_label="k", y_label="Pass@k", x_scale="log2", y_scale=y_scale), "alt")  # type: ignore[arg-type]  # a Literal


def test_the_same_numbers_give_the_same_bytes() -> None:
    assert draw(CURVE) == draw(CURVE)


def test_an_svg_is_well_formed_names_itself_and_needs_nothing_else() -> None:
    figure = line_figure([CURVE], x_label="k", y_label="Pass@k", x_scale="log2")
    svg = to_svg(figure, 'Pass@k of "a" <b>')
    root = ElementTree.fromstring(svg)
    assert root.attrib["aria-label"] == 'Pass@k of "a" <b>' and root.attrib["role"] == "img"
    assert "width" not in root.attrib and "viewBox" in root.attrib
    assert not re.search(r'(href|src)="(?!#)|url\((?!#)|<!DOCTYPE|<\?xml', svg)
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert len(ids) == len(set(ids))


def test_two_figures_of_a_page_share_no_id() -> None:
    figure = line_figure([CURVE], x_label="k", y_label="Pass@k")
    first, second = (set(re.findall(r'\bid="([^"]+)"', to_svg(figure, alt))) for alt in ("one", "two"))
    assert first and second and not first & second


@pytest.mark.parametrize(
    ("line", "y_scale"),
    [
        (Line("one point", [3], [0.5], "#000"), "linear"),
        (Line("zeros on a log axis", [1, 2], [0.0, 0.0], "#000"), "log"),
        (Line("gap", [1, 2, 3], [0.1, float("nan"), 0.3], "#000"), "log"),
    ],
    ids=lambda value: getattr(value, "label", value),
)
def test_awkward_series_still_draw(line: Line, y_scale: str) -> None:
    assert line.color.replace("#000", "#000000") in draw(line, y_scale=y_scale)


def test_labels_are_text_and_not_mathematics() -> None:
    svg = to_svg(stacked_bars_figure(["a_$b$<i>"], {"rollout": [1.0], "update": [2.0]}, x_label="seconds"), "alt")
    assert "a_$b$&lt;i&gt;" in svg
    assert color_of(0) in svg and color_of(1) in svg


def test_a_picture_is_a_png(tmp_path: Path) -> None:
    write_png(panels_figure({"puzzle": [CURVE], "MATH": [CURVE]}, x_label="k", y_label="Pass@k", x_scale="log2"), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
