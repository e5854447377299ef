"""How a config's step scales from its GPUs to 1,024, the batch as it is: a table and a picture.

May import: config, models, observability, rich, planning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from megatron_nsr.config import Config
from megatron_nsr.models.hf_config import ModelShape
from megatron_nsr.planning.hardware import Gpu
from megatron_nsr.planning.layout import Layout, layout_of, trainer_gpus
from megatron_nsr.planning.memory import ELEMENT_BYTES, plan_memory
from megatron_nsr.planning.plan import engine_of, training_phases
from megatron_nsr.planning.step_time import Trainer
from megatron_nsr.planning.timeline import ENGINES, TRAINER, Deployment, Timeline, simulate
from megatron_nsr.planning.workload import Lengths, workload_of
from megatron_nsr.types import UserError

MOST_GPUS = 1024
SERVING_SHARES = [0.25, 0.5, 0.75]  # of the GPUs, tried for engines of their own where the config has no servers
DEDICATED_MEMORY = 0.9  # of a GPU, for an engine that has it alone
STEPS = 3
MODES = ("colocated", "disaggregated", "one step ahead")


@dataclass(frozen=True, slots=True)
class Point:
    """One deployment at one number of GPUs. efficiency: tokens a second and GPU, over those of the first deployment."""

    mode: str
    gpus: int
    fits: bool
    timeline: Timeline
    efficiency: float


def scaling(config: Config, shape: ModelShape, gpus: int, gpu: Gpu, lengths: Lengths) -> list[Point]:
    """Doubles the GPUs, and with them the data-parallel ranks and the engines."""
    study = Study(config, shape, gpus, gpu, lengths)
    sizes = [gpus << doubling for doubling in range(MOST_GPUS.bit_length()) if gpus << doubling <= max(gpus, MOST_GPUS)]
    found: list[Point] = []
    for size in sizes:
        for mode, deployments in zip(MODES, study.deployments(size), strict=True):
            runs = [(study.run(one), fits) for one, fits in deployments]
            if runs:
                timeline, fits = max(runs, key=lambda run: run[0].tokens_per_second)
                base = found[0].timeline if found else timeline
                efficiency = _per_gpu(timeline) / _per_gpu(base)
                found.append(Point(mode, size, fits, timeline, efficiency))
    return found


@dataclass(frozen=True, slots=True)
class Study:
    """What the deployments of a config have in common."""

    config: Config
    shape: ModelShape
    gpus: int  # that the config is meant for
    gpu: Gpu
    lengths: Lengths

    def run(self, deployment: Deployment) -> Timeline:
        return simulate(deployment, workload_of(self.config, self.lengths), STEPS, self.config.run.seed)

    def deployments(self, gpus: int) -> tuple[list[tuple[Deployment, bool]], ...]:
        """For each mode those that are possible on this many GPUs, and whether the trainer fits."""
        apart = list(self._apart(gpus))
        ahead = [(replace(one, ahead=1), fits) for one, fits in apart]
        return list(self._colocated(gpus)), apart, ahead

    def _colocated(self, gpus: int) -> Iterator[tuple[Deployment, bool]]:
        config = self._with({"mode": "colocated", "servers": [], "max_staleness": 0}, {})
        engine = engine_of(config, self.shape, self.gpu, self.lengths)
        engines = max(1, gpus // engine.tensor)
        with suppress(UserError):  # a layout that divides the GPUs left by servers need not divide all of them
            train, push, fits = self._trained(config, layout_of(config, self.shape, gpus))
            yield Deployment(engine, engines, gpus, train, push, shared=True), fits

    def _apart(self, gpus: int) -> Iterator[tuple[Deployment, bool]]:
        if self.config.rollout.mode == "server":
            config, shares = self.config, [1 - trainer_gpus(self.config, self.gpus) / self.gpus]
        else:
            alone = {"mode": "server", "gpu_memory_utilization": DEDICATED_MEMORY, "kv_cache_mib": None, "sleep_level": 0}
            config, shares = self._with(alone, {"offload": "none"}), SERVING_SHARES
        engine = engine_of(config, self.shape, self.gpu, self.lengths)
        for share in shares:
            engines = round(gpus * share) // engine.tensor
            training = gpus - engines * engine.tensor
            try:
                layout = layout_of(config, self.shape, training)
            except UserError:
                continue
            if engines:
                train, push, fits = self._trained(config, layout)
                yield Deployment(engine, engines, training, train, push, shared=False), fits

    def _with(self, rollout: dict[str, Any], training: dict[str, Any]) -> Config:
        """The config with these fields of two sections."""
        sections = {"rollout": self.config.rollout.model_copy(update=rollout), "training": self.config.training.model_copy(update=training)}
        return self.config.model_copy(update=sections)

    def _trained(self, config: Config, layout: Layout) -> tuple[float, float, bool]:
        """Seconds of a step without sampling and push, seconds of the push, and whether the trainer fits."""
        workload = workload_of(config, self.lengths)
        trainer = Trainer(self.shape, layout, workload, self.gpu, ELEMENT_BYTES[config.model.dtype])
        memory = plan_memory(config, self.shape, layout, workload, self.gpu)
        seconds = {name: phase.seconds for name, phase in training_phases(config, trainer, memory).items()}
        push = seconds.pop("push")
        return sum(seconds.values()), push, memory.problem is None


def render_scaling(points: Sequence[Point]) -> Table:
    table = Table(title=f"{STEPS} simulated steps, the same batch on every number of GPUs", title_justify="left", box=SIMPLE)
    table.add_column("deployment")
    for header in ("GPUs", "that sample", "step s", "tokens/s", "efficiency", "engines busy", "trainer busy", "fits"):
        table.add_column(header, justify="right")
    for point in sorted(points, key=lambda one: MODES.index(one.mode)):
        row = point_values(point)
        shares = (f"{row[name]:.0%}" for name in ("efficiency", "engines_busy", "trainer_busy"))
        numbers = (f"{row['step_seconds']:,.1f}", f"{row['tokens_per_second']:,.0f}", *shares, "yes" if point.fits else "no")
        table.add_row(point.mode, str(point.gpus), str(row["sampling_gpus"]), *numbers)
    return table


def point_values(point: Point) -> dict[str, float]:
    deployment, timeline = point.timeline.deployment, point.timeline
    return {
        "gpus": point.gpus,
        "sampling_gpus": deployment.engines * deployment.engine.tensor,
        "step_seconds": timeline.seconds / STEPS,
        "tokens_per_second": timeline.tokens_per_second,
        "efficiency": point.efficiency,
        "engines_busy": timeline.busy_share(ENGINES),
        "trainer_busy": timeline.busy_share(TRAINER),
    }


def write_scaling_picture(path: Path, points: Sequence[Point]) -> None:
    """Raises UserError where `path` is no .png."""
    from megatron_nsr.observability.plots import Line, color_of, line_figure, marker_of, write_png

    if path.suffix != ".png":
        raise UserError(f"--plot {path}: the picture is a PNG; give FILE.png")
    lines = []
    for index, mode in enumerate(MODES):
        mine = [point for point in points if point.mode == mode]
        if mine:
            x, y = [float(point.gpus) for point in mine], [point.efficiency for point in mine]
            lines.append(Line(mode, x, y, color_of(index), marker_of(index), dashed=index > 0))
    figure = line_figure(lines, x_label="GPUs", y_label="tokens/s a GPU, over the first", x_scale="log2", size=(7.0, 4.2), zero=True)
    figure.axes[0].legend()
    write_png(figure, path)


def _per_gpu(timeline: Timeline) -> float:
    return timeline.tokens_per_second / timeline.deployment.gpus
