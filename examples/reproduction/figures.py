"""The page's figures. May import: the comparison, megatron_nsr.observability.plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from examples.reproduction.comparison import BASE, Comparison
from examples.reproduction.intervals import Interval
from examples.reproduction.orderings import NAMES
from examples.reproduction.plan import LONG_METHODS
from examples.reproduction.results import KS
from megatron_nsr.observability.plots import Line, color_of, panels_figure, write_png

LONG_KS = (1, 8, 64)


def write_figures(comparison: Comparison, directory: Path, prefix: str) -> tuple[str, str]:
    """Writes DIRECTORY/PREFIX_{pass_at_k,long}.png and returns their names."""
    names = f"{prefix}_pass_at_k.png", f"{prefix}_long.png"
    write_png(panels_figure(_pass_at_k_panels(comparison), x_label="k", y_label="Pass@k", x_scale="log2"), directory / names[0])
    write_png(panels_figure(_long_panels(comparison), x_label="training step", y_label="Pass@k"), directory / names[1])
    return names


def _pass_at_k_panels(comparison: Comparison) -> dict[str, list[Line]]:
    field = comparison.at_equal_steps()
    order = [BASE, *comparison.methods]
    levels = [_line(name, order.index(name), KS, field.level(name)) for name in order]
    differences = [_line(name, order.index(name), KS, field.difference(name, BASE)) for name in order]
    return {f"Pass@k after {comparison.results.steps} steps": levels, "minus the base's": differences}


def _long_panels(comparison: Comparison) -> dict[str, list[Line]]:
    order = [BASE, *comparison.methods]
    panels: dict[str, list[Line]] = {f"Pass@{k}": [] for k in LONG_KS}
    for method in (name for name in LONG_METHODS if name in comparison.methods):
        steps = comparison.long_steps(method)
        fields = [comparison.at_step(step, [method]) for step in steps]
        starting, reached = fields[0].level(BASE), [field.level(method) for field in fields]
        for k in LONG_KS:
            column = KS.index(k)
            intervals = [starting[column], *(each[column] for each in reached)]
            panels[f"Pass@{k}"].append(_line(method, order.index(method), [0, *steps], intervals))
    return panels


def _line(name: str, color: int, x: Sequence[int], intervals: Sequence[Interval]) -> Line:
    return Line(
        NAMES.get(name, name),
        list(x),
        [each.mean for each in intervals],
        color_of(color),
        low=[each.low for each in intervals],
        high=[each.high for each in intervals],
    )
