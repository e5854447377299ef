"""Figures of plain numbers as inline SVG or PNG: lines with bands, and stacked bars.

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

# Okabe and Ito's palette, which colour-blind readers can tell apart; its yellow is too faint on white.
PALETTE = ("#4d4d4d", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7b4fa3")
INK, FAINT = "#3c434c", "#dfe3e8"
STYLE = {
    "svg.fonttype": "none",  # text stays text: small, searchable, and drawn in the page's font
    "text.parse_math": False,  # a run may be called a_$b$
    "font.size": 11,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
MARKED_POINTS = 12  # shorter lines also show their points: a line of one point would be invisible

Scale = Literal["linear", "log2", "log"]


@dataclass(frozen=True)
class Line:
    """One curve; x ascending. low, high: a band around it, the same length as x."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    dashed: bool = False
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def color_of(index: int) -> str:
    """The colour of the index-th thing compared, the same in every figure."""
    return PALETTE[index % len(PALETTE)]


def line_figure(
    lines: Sequence[Line], *, x_label: str, y_label: str, x_scale: Scale = "linear", y_scale: Scale = "linear", legend: bool = False
) -> Figure:
    """Curves in one axes; values that are not finite, or not positive on a log axis, leave a gap."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.0, 3.0), layout="constrained")
        draw_lines(figure.subplots(), lines, x_label=x_label, y_label=y_label, x_scale=x_scale, y_scale=y_scale)
        if legend:
            _legend_below(figure)
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
    """Draws the curves and their bands and names the axes."""
    for line in lines:
        y = np.asarray(line.y, dtype=float)
        marker = "o" if len(y) <= MARKED_POINTS else None
        axes.plot(
            line.x,
            y,
            color=line.color,
            linestyle="--" if line.dashed else "-",
            marker=marker,
            markersize=3.5,
            linewidth=1.7,
            label=line.label,
        )
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=line.color, alpha=0.11, linewidth=0)
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
    """The figure as an <svg> element to put into a page, with `alt` for those who cannot see it."""
    buffer = io.StringIO()
    # The salt makes ids the same from run to run, and different from one figure of a page to the next.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": alt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML declaration and the DTD, which names an external resource
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # group names repeat from figure to figure; ids must be unique in a page
    svg = re.sub(r' (width|height)="[0-9.]+pt"', "", svg, count=2)  # the page decides; the viewBox keeps the shape
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(alt)}"', 1)


def write_png(figure: Figure, path: Path) -> None:
    """Writes the figure as a PNG of 150 dots an inch, atomically."""
    with matplotlib.rc_context(STYLE), replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, facecolor="white")


def _bar_axes(labels: Sequence[str], x_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.0, 1.1 + 0.42 * len(labels)), layout="constrained")
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
