"""Figures: self-contained, reproducible SVG that shows every series it was given."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from megatron_nsr.observability.plots import (
    DARK_PALETTE,
    PALETTE,
    Line,
    color_of,
    css_color,
    line_figure,
    marker_of,
    panels_figure,
    running_mean,
    smoothing_window,
    stacked_bars_figure,
    theme_variables,
    to_svg,
    write_png,
)

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


# Linear RGB as it is seen without one kind of cones (Machado, Oliveira and Fernandes 2009, table 1, severity 1.0), and with all.
VISION = {
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
    "trichromacy": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
}
XYZ = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))  # of linear sRGB


def linear(color: str) -> np.ndarray:
    values = np.array([int(color[start : start + 2], 16) for start in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of linear sRGB under D65."""
    relative = np.array(XYZ) @ np.clip(rgb, 0, 1) / np.array([0.9505, 1.0, 1.089])
    x, y, z = np.where(relative > 0.008856, np.cbrt(relative), 7.787 * relative + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("palette", [PALETTE, DARK_PALETTE], ids=["light", "dark"])
def test_any_two_colours_differ_for_colour_blind_readers_too(vision: str, palette: tuple[str, ...]) -> None:
    seen = {color: lab(np.array(VISION[vision]) @ linear(color)) for color in palette}
    assert len(seen) == 8
    nearest = min((float(np.linalg.norm(seen[one] - seen[other])), one, other) for one, other in combinations(seen, 2))
    assert nearest[0] > 15, nearest  # 2 can just be seen side by side


def test_runs_beyond_the_palette_differ_in_marker() -> None:
    looks = [(color_of(index), marker_of(index)) for index in range(56)]
    assert len(set(looks)) == 56
    svgs = [draw(Line("a", [1, 2, 4], [1, 2, 3], "#000000", marker_of(index))) for index in range(2)]
    assert svgs[0] != svgs[1]


def test_a_figure_takes_its_colours_from_the_page() -> None:
    svg = draw(CURVE)
    light, dark = theme_variables(dark=False), theme_variables(dark=True)
    assert css_color(color_of(1)) == f"var(--series-1, {light['--series-1']})" and css_color(color_of(1)) in svg
    assert set(re.findall(r"var\((--[a-z0-9-]+)", svg)) <= light.keys() == dark.keys()
    drawn = set(re.findall(r"(?<!, )#[0-9a-f]{6}", " ".join(re.findall(r'style="([^"]*)"', svg))))
    assert not drawn  # every colour follows the theme
    assert all(light[name] != dark[name] for name in light)


def test_a_long_line_keeps_every_value_under_its_running_mean() -> None:
    long, short = (Line("a", list(range(n)), [float(x % 2) for x in range(n)], color_of(0)) for n in (100, 40))
    assert (smoothing_window([short]), smoothing_window([short, long]), smoothing_window([])) == (1, 5, 1)
    assert draw(long).count("opacity: 0.28") == 1 and "opacity: 0.28" not in draw(short)
    assert running_mean([1, 2, 6], 3).tolist() == [1.5, 3, 4]
    assert running_mean([1, float("nan"), 6], 3).tolist() == [1, 3.5, 6]
    assert running_mean([1, 2], 1).tolist() == [1, 2]
