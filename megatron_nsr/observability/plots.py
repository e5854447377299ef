"""Figures of plain numbers as inline SVG that follows the page's light or dark theme, or PNG: lines with bands, and bars.

May import: matplotlib and numpy.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from megatron_nsr.observability.run_directory import replacing

# For a light and for a dark page; colour-blind readers can tell each one's colours apart: tests/unit/observability/test_plots.py.
PALETTE = ("#4d4d4d", "#024db0", "#c37d00", "#128c51", "#e755b7", "#973300", "#398fff", "#5f296a")
DARK_PALETTE = ("#c4c9d0", "#3791ff", "#f3842c", "#48d590", "#c370a0", "#ffc40f", "#a9c8f7", "#9466ba")
INK, FAINT = "#3c434c", "#dfe3e8"
DARK_INK, DARK_FAINT = "#c9d0d8", "#333c47"
THEME = {color: f"--series-{index}" for index, color in enumerate(PALETTE)} | {INK: "--axis", FAINT: "--grid"}
# One fewer than colours, so that 56 lines differ in one or the other; and what a legend shows for each.
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖"}
STYLE = {
    "svg.fonttype": "none",  # text stays text: small, searchable, and drawn in the page's font
    "text.parse_math": False,  # a run may be called a_$b$
    "font.size": 11,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
MARKED_POINTS = 12  # shorter lines show all their points, longer ones about half as many
SMOOTHED_POINTS = 40  # longer lines are noise at this size: they are drawn thin, with a running mean over a 20th of them
FILLED_BANDS = 3  # of more, the fills would mix to grey: only their edges are drawn
PANEL, WIDE = (4.6, 2.9), (9.4, 4.3)  # inches; a page shows them in one and in two of its columns, so that text has one size

Scale = Literal["linear", "log2", "log"]


@dataclass(frozen=True)
class Line:
    """One curve; x ascending. low, high: a band around it, the same length as x."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    marker: str = "o"
    dashed: bool = False
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def color_of(index: int) -> str:
    """The colour of the index-th thing compared, on a light page and the same in every figure."""
    return PALETTE[index % len(PALETTE)]


def marker_of(index: int) -> str:
    """The marker of the index-th thing compared: a line can be told without its colour."""
    return list(MARKERS)[index % len(MARKERS)]


def css_color(color: str) -> str:
    """A colour of the light page as CSS that follows the page's theme; any other colour as it is."""
    return f"var({THEME[color]}, {color})" if color in THEME else color


def theme_variables(dark: bool) -> dict[str, str]:
    """The CSS custom properties that a page with `to_svg`'s figures has to set, and their colours."""
    colors = (*DARK_PALETTE, DARK_INK, DARK_FAINT) if dark else (*PALETTE, INK, FAINT)
    return dict(zip(THEME.values(), colors, strict=True))


def smoothing_window(lines: Sequence[Line]) -> int:
    """Values that a figure of these lines averages over, odd; 1 where it draws them as they are."""
    longest = max((len(line.x) for line in lines), default=0)
    return longest // 20 | 1 if longest > SMOOTHED_POINTS else 1


def banded(lines: Sequence[Line]) -> list[Line]:
    """Those with a band."""
    return [line for line in lines if line.low is not None and line.high is not None]


def same_curve(line: Line, other: Line) -> bool:
    """Whether one would hide the other."""
    return bool(np.array_equal(line.x, other.x) and np.array_equal(line.y, other.y, equal_nan=True))


def running_mean(values: Sequence[float] | np.ndarray, window: int) -> np.ndarray:
    """The mean of the `window` values around each one, of fewer at the ends; NaN counts as absent. float64 [values]."""
    padded = np.pad(np.asarray(values, dtype=float), window // 2, constant_values=np.nan)
    around = np.lib.stride_tricks.sliding_window_view(padded, window)
    known = np.isfinite(around)
    with np.errstate(invalid="ignore"):
        return np.where(known, around, 0).sum(axis=1) / known.sum(axis=1)


def line_figure(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    x_scale: Scale = "linear",
    y_scale: Scale = "linear",
    size: tuple[float, float] = PANEL,
    zero: bool = False,
    x_limits: tuple[float, float] | None = None,
) -> Figure:
    """Curves in one axes; values that are not finite, or not positive on a log axis, leave a gap. zero: marks y = 0.

    x_limits: the ends of a linear x axis, on which figures of one width then have the same ticks.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        if zero:
            axes.axhline(0, color=INK, linewidth=1)
        draw_lines(axes, lines, x_label=x_label, y_label=y_label, x_scale=x_scale, y_scale=y_scale)
        if x_limits is not None:
            margin = 0.03 * (x_limits[1] - x_limits[0])
            axes.set_xlim(x_limits[0] - margin, x_limits[1] + margin)
    return figure


def panels_figure(panels: Mapping[str, Sequence[Line]], *, x_label: str, y_label: str, x_scale: Scale = "linear") -> Figure:
    """One axes a panel, side by side under their titles, with one legend below: the form for a picture by itself."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4 * len(panels), 4.2), layout="constrained")
        for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            draw_lines(axes, lines, x_label=x_label, y_label=y_label, x_scale=x_scale)
            axes.set_title(title, color=INK, fontsize=12)
        _legend_below(figure)
    return figure


def draw_lines(
    axes: Axes, lines: Sequence[Line], *, x_label: str, y_label: str, x_scale: Scale = "linear", y_scale: Scale = "linear"
) -> None:
    """Draws the curves, long ones with their running mean, and their bands, and names the axes."""
    window = smoothing_window(lines)
    filled = len(banded(lines)) <= FILLED_BANDS
    for index, line in enumerate(lines):
        hiding = sum(same_curve(line, later) for later in lines[index + 1 :])  # each leaves a rim of this one to be seen
        y = np.asarray(line.y, dtype=float)
        if window > 1:
            axes.plot(line.x, y, color=line.color, linewidth=0.6, alpha=0.28)
        axes.plot(
            line.x,
            running_mean(y, window),
            color=line.color,
            linestyle=(0, (4, 2)) if line.dashed else "-",
            marker=line.marker,
            markevery=_marked(len(y), index),
            markersize=4 + 3 * hiding,
            linewidth=1.7 + 2.4 * hiding,
            label=line.label,
        )
        if line.low is not None and line.high is not None:
            if filled:
                axes.fill_between(line.x, line.low, line.high, color=line.color, alpha=0.13, linewidth=0)
            else:
                for edge in (line.low, line.high):
                    axes.plot(line.x, edge, color=line.color, linewidth=0.7, alpha=0.7)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    _scale_x(axes, x_scale, sorted({x for line in lines for x in line.x}))
    if y_scale == "log":
        _log_y(axes, [value for line in lines for value in line.y if value > 0])


def bars_figure(labels: Sequence[str], values: Sequence[float], colors: Sequence[str], *, x_label: str) -> Figure:
    """One horizontal bar a label, from the top down, each in its colour."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _bar_axes(labels, x_label)
        axes.barh(range(len(labels)), values, height=0.62, color=list(colors), linewidth=0)
    return figure


def stacked_bars_figure(labels: Sequence[str], parts: Mapping[str, Sequence[float]], *, x_label: str) -> Figure:
    """One horizontal bar a label, from the top down, made of the parts in their order; part i has colour i."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _bar_axes(labels, x_label)
        left = np.zeros(len(labels))
        for index, values in enumerate(parts.values()):
            axes.barh(range(len(labels)), values, left=left, height=0.62, color=color_of(index), linewidth=0)
            left += np.asarray(values, dtype=float)
    return figure


def to_svg(figure: Figure, alt: str) -> str:
    """The figure as an <svg> element to put into a page that sets `theme_variables`, with `alt` for those who cannot see it."""
    buffer = io.StringIO()
    # The salt makes ids the same from run to run, and different from one figure of a page to the next.
    salt = f"{alt} {figure.get_size_inches()}"
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML declaration and the DTD, which names an external resource
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # group names repeat from figure to figure; ids must be unique in a page
    svg = re.sub(r' (width|height)="[0-9.]+pt"', "", svg, count=2)  # the page decides; the viewBox keeps the shape
    svg = re.sub(r'(?<= d=")[^"]*', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)  # a hundredth of a point is enough
    svg = re.sub(r'(?<= style=")[^"]*', lambda style: re.sub("#[0-9a-f]{6}", lambda color: css_color(color[0]), style[0]), svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(alt)}"', 1)


def write_png(figure: Figure, path: Path) -> None:
    """Writes the figure as a PNG of 150 dots an inch, atomically."""
    with matplotlib.rc_context(STYLE), replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, facecolor="white")


def _marked(points: int, index: int) -> tuple[int, int]:
    """(first, every): which points carry a marker; those of neighbouring lines are not at the same x."""
    every = max(1, -(-2 * points // MARKED_POINTS)) if points > MARKED_POINTS else 1
    return (index * every // 3 % every, every)


def _bar_axes(labels: Sequence[str], x_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(PANEL[0], 0.9 + 0.34 * len(labels)), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(range(len(labels)), [_shorten(label) for label in labels])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(x_label)
    return figure, axes


def _scale_x(axes: Axes, scale: Scale, positions: Sequence[float]) -> None:
    if scale == "linear":
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        return
    axes.set_xscale("log", base=2 if scale == "log2" else 10)
    if scale == "log2" and len(positions) <= MARKED_POINTS:  # the values that were measured are the ticks
        axes.xaxis.set_major_locator(FixedLocator(list(positions)))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _log_y(axes: Axes, positive: Sequence[float]) -> None:
    if not positive:
        return
    axes.set_yscale("log", nonpositive="mask")
    number = FuncFormatter(lambda value, _: f"{value:.0e}")
    axes.yaxis.set_major_formatter(number)
    axes.yaxis.set_minor_formatter(number if max(positive) < 10 * min(positive) else NullFormatter())


def _legend_below(figure: Figure) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, max(1, len(labels))))


def _shorten(label: str) -> str:
    return label if len(label) <= 18 else f"{label[:8]}…{label[-9:]}"
