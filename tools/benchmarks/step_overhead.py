"""Where a training step's time goes: generation, grading, megatron-core, and everything else, which is to stay below a tenth.

Usage: OMP_NUM_THREADS=1 python -m tools.benchmarks.step_overhead [--base RUN/hf] [--steps N] [--out FILE]; may import everything.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_nsr.components import Components, build_components, read_inputs
from megatron_nsr.config import Config, EvaluationConfig
from megatron_nsr.config_files import load_config
from megatron_nsr.observability.run_directory import open_run
from megatron_nsr.platform.quiet import ignore_library_warnings
from megatron_nsr.platform.signals import StopRequest
from megatron_nsr.recording import open_loggers
from megatron_nsr.trainer import Trainer

CONFIGURATION = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
GOAL = 0.10
# The work itself; what stands after it is ours: bookkeeping around that work.
WORK = ("generation", "grading", "forward_backward", "optimizer")
OVERHEAD = ("rollout_bookkeeping", "packing", "update_bookkeeping", "weight_push", "logging", "rest")


@dataclass
class Stopwatch:
    """Wall and CPU seconds of nested phases, each without what is inside it. CPU: all threads of this process."""

    spent: dict[str, list[float]] = field(default_factory=dict)
    _open: list[str] = field(default_factory=list)
    _since: tuple[float, float] = (0.0, 0.0)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._turn()
        self._open.append(phase)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def take(self) -> dict[str, list[float]]:
        """{phase: [wall, CPU]} since the last call."""
        self._turn()
        spent, self.spent = self.spent, {}
        return spent

    def watch(self, owner: Any, method: str, phase: str) -> None:
        """Makes every call of `owner.method` count as that phase, on this object only."""
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(phase):
                return inner(*args, **kwargs)

        setattr(owner, method, timed)

    def _turn(self) -> None:
        now = (time.perf_counter(), time.process_time())
        if self._open:
            phase = self.spent.setdefault(self._open[-1], [0.0, 0.0])
            for i in range(2):
                phase[i] += now[i] - self._since[i]
        self._since = now


class MeasuredTrainer(Trainer):
    """The trainer's own loop; a lap is from one step's start to the next one's. The first lap is what came before step 1."""

    def __init__(self, *args: Any, watch: Stopwatch) -> None:
        super().__init__(*args)
        self.watch = watch
        self.laps: list[dict[str, list[float]]] = []

    def train_step(self) -> dict[str, float]:
        self.laps.append(self.watch.take())
        return super().train_step()


def configure(folder: Path, base: Path | None, objective: str, steps: int, checkpoints: int) -> Config:
    """The quickstart's configuration and data, without benchmarks; random weights where there is no base."""
    from examples.quickstart.prepare import prepare

    prepare(folder)
    overrides = {
        "model.path": base or folder / "model",
        "model.initialization": "pretrained" if base else "random",
        "run.dir": folder / "run",
        "run.steps": steps,
        "data.train": folder / "data" / "train.jsonl",
        "objective.name": objective,
        "checkpoint.every": max(1, steps // checkpoints),
        "checkpoint.export_hf": "false",
    }
    config = load_config(CONFIGURATION, [f"{name}={value}" for name, value in overrides.items()])
    return config.model_copy(update={"evaluation": EvaluationConfig()})


def watch_components(watch: Stopwatch, parts: Components) -> None:
    assert parts.rollouts is not None and parts.graders is not None
    actor = parts.actor
    watch.watch(parts.rollouts, "generate", "rollout_bookkeeping")
    watch.watch(parts.rollouts._engine._llm, "generate", "generation")  # type: ignore[attr-defined]  # no other way into the engine
    watch.watch(parts.graders, "grade", "grading")
    watch.watch(actor, "prepare", "update_bookkeeping")
    watch.watch(actor, "update", "update_bookkeeping")
    watch.watch(actor, "pack", "packing")
    watch.watch(actor, "_forward_backward", "forward_backward")
    watch.watch(actor, "_run", "forward_backward")
    watch.watch(actor, "_optimizer_step", "optimizer")
    watch.watch(parts.rollouts, "push", "weight_push")


def run(config: Config, warm_up: int) -> dict[str, Any]:
    watch, stop = Stopwatch(), StopRequest()
    inputs, directory = read_inputs(config, training=True), open_run(config)
    with ExitStack() as stack:
        parts = build_components(config, inputs, stack)
        watch_components(watch, parts)
        trainer = MeasuredTrainer(config, directory, inputs, parts, stop, watch=watch)
        loggers = stack.enter_context(open_loggers(directory, config, completed_steps=0))
        watch.watch(loggers, "log", "logging")
        watch.watch(trainer, "_checkpoint", "checkpoint")
        with watch("rest"):
            trainer.run(loggers)
        steps = [*trainer.laps[1:], watch.take()]
    return summarise(steps[warm_up:], [step["checkpoint"] for step in steps if "checkpoint" in step])


def summarise(steps: list[dict[str, list[float]]], checkpoints: list[list[float]]) -> dict[str, Any]:
    """Medians over steps, in milliseconds, and the median share of the step that is overhead."""
    result: dict[str, Any] = {"steps": len(steps), "goal": GOAL}
    for index, clock in enumerate(("wall", "cpu")):
        columns = {phase: [step.get(phase, [0.0, 0.0])[index] for step in steps] for phase in (*WORK, *OVERHEAD)}
        totals = [sum(values) for values in zip(*columns.values(), strict=True)]
        ours = [sum(values) for values in zip(*(columns[phase] for phase in OVERHEAD), strict=True)]
        result[clock] = {
            "ms": {phase: _ms(values) for phase, values in columns.items()},
            "overhead_ms": _ms(ours),
            "step_ms": _ms(totals),
            "overhead": round(statistics.median(part / whole for part, whole in zip(ours, totals, strict=True)), 4),
            "checkpoint_ms": _ms([taken[index] for taken in checkpoints]),
        }
    return result


def _ms(values: list[float]) -> float:
    return round(1000 * statistics.median(values), 2)


def table(result: dict[str, Any]) -> str:
    wall, cpu = result["wall"], result["cpu"]
    lines = [f"{'medians of ' + str(result['steps']) + ' steps':<24}{'wall ms':>10}{'CPU ms':>10}{'of wall':>10}"]
    for phase in (*WORK, *OVERHEAD):
        lines.append(f"{phase:<24}{wall['ms'][phase]:>10.1f}{cpu['ms'][phase]:>10.1f}{wall['ms'][phase] / wall['step_ms']:>10.1%}")
    for name, key in (("step", "step_ms"), ("everything but work", "overhead_ms"), ("a checkpoint, apart", "checkpoint_ms")):
        lines.append(f"{name:<24}{wall[key]:>10.1f}{cpu[key]:>10.1f}")
    lines.append(f"overhead {wall['overhead']:.1%} of wall time, {cpu['overhead']:.1%} of CPU time; the goal is {result['goal']:.0%}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, help="a trained base, RUN/hf; without it the weights are random")
    parser.add_argument("--objective", default="nsr")
    parser.add_argument("--steps", type=int, default=30, help="steps that are counted")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before them")
    parser.add_argument("--checkpoints", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    ignore_library_warnings()
    steps = arguments.steps + arguments.warm_up
    with tempfile.TemporaryDirectory() as folder:
        result = run(configure(Path(folder), arguments.base, arguments.objective, steps, arguments.checkpoints), arguments.warm_up)
    print(table(result))
    text = json.dumps({"base": "trained" if arguments.base else "random", "objective": arguments.objective, **result}, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
