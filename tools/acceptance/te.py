"""Part (c): Transformer Engine's layers beside the cpu backend, checkpoints that go both ways, and training in FP8 beside BF16.

May import: everything but vLLM.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_nsr.types import UserError
from tools.acceptance import processes
from tools.acceptance.backend_numbers import Case, Numbers, measure, write_cases
from tools.acceptance.curves import Lesson, compare_curves, learn
from tools.acceptance.flops import update_flops
from tools.acceptance.limits import measure_limits, wall_seconds
from tools.acceptance.models import write_model
from tools.acceptance.policies import build_policy_of, free_device_memory, made_up, packed, policy_config, this_backend, update_on
from tools.acceptance.policy import mean_gap
from tools.acceptance.record import Goal, NotRun, Record, Step

GOALS = {"fp8": Goal("8 layers of the 7B shape: updates a second in FP8 over those in BF16", at_least=1.2)}
RECIPES = ("delayed", "tensorwise", "blockwise")
# What is compared with BF16 over the steps: keys of the model section. A CPU has no FP8 layers: there two settings that it has.
LEARNED: dict[str, dict[str, Any]] = {name: {"fp8": name} for name in RECIPES} | {
    "tensorwise but for the edge layers": {"fp8": "tensorwise", "fp8_edge_layers": 1}
}
LEARNED_DRY: dict[str, dict[str, Any]] = {"bfloat16": {"dtype": "bfloat16"}}
OF_CPU_ERROR = 2.0  # what bf16 may err here over what it errs on the cpu backend, both against float32 there
LARGEST_SHARE = 0.1  # of what is learned, that the loss curves of two precisions may be apart on average


@dataclass(frozen=True, slots=True)
class Settings:
    """fields: of the small model that both backends run. speed: of the model whose updates are timed, in micro-batches of 4 sequences."""

    shape: str
    fields: dict[str, Any]
    curve_shape: str
    lesson: Lesson
    speed_shape: str
    speed: dict[str, Any] = field(default_factory=dict)
    speed_prompt: int = 128
    speed_response: int = 896
    micro_batches: int = 4


GPU = Settings(
    "0.5b",
    {"num_hidden_layers": 4, "vocab_size": 4096},
    "0.5b",
    Lesson(50, 24, 120, 3e-4),
    "7b",
    {"num_hidden_layers": 8, "vocab_size": 16384},
)
DRY = Settings("tiny", {}, "tiny", Lesson(20, 8, 4, 1e-2), "tiny", {}, 4, 12, 2)


def run(record: Record, work: Path) -> None:
    settings = DRY if record.dry else GPU
    record.settings = asdict(settings)
    backend = this_backend()
    measure_limits(record, backend.device)
    with record.step("bf16 beside the cpu backend, checkpoints both ways") as step:
        beside_cpu(record, step, settings, work)
    base, others = ("float32", LEARNED_DRY) if record.dry else ("bfloat16", LEARNED)
    model = write_model(work / "curve", settings.curve_shape)
    curve = None
    with record.step(f"loss curve, {base}") as step:
        curve = learn(model, settings.lesson, dtype=base)
        step.figure(losses=curve.losses)
    for name, setting in others.items():
        with record.step(f"loss curve, {name} beside {base}") as step:
            if curve is None:
                raise NotRun(f"there is no curve of {base}")
            with where_supported():
                other = learn(model, settings.lesson, **{"dtype": base, **setting})
            compare_curves(step, curve, other, largest_share=LARGEST_SHARE)
    speed(record, settings, work, backend.device)


@contextmanager
def where_supported() -> Iterator[None]:
    """What the project refuses, with a reason, is not run: not every GPU and version computes by every recipe."""
    try:
        yield
    except UserError as refused:
        raise NotRun(str(refused)) from None


def beside_cpu(record: Record, step: Step, settings: Settings, work: Path) -> None:
    """float32 on the cpu backend is right; bf16 there says how much bf16 errs; here may err twice that."""
    model = str(write_model(work / "small", settings.shape, **settings.fields))

    def case(name: str, dtype: str = "bfloat16", **fields: Any) -> Case:
        return Case(model, dtype, str(work / f"{name}.pt"), **fields)

    def on_cpu(*cases: Case) -> list[Numbers]:
        file = write_cases(work / "cases.json", list(cases))
        command = processes.python("-m", "tools.acceptance.backend_numbers", file)
        processes.run(command, work / "cpu_backend.log", record.remaining_s, {"CUDA_VISIBLE_DEVICES": ""})
        return [torch.load(one.out, weights_only=False) for one in cases]

    cpu_saved, saved = str(work / "cpu_backend" / "step_1"), str(work / "this_backend" / "step_1")
    right, forgotten, cpu = on_cpu(case("right", "float32"), case("forgotten", "float32", forget=True), case("cpu", save=cpu_saved))
    mine, loaded = measure(case("mine", save=saved)), measure(case("loaded", load=cpu_saved))
    (back,) = on_cpu(case("back", load=saved))
    for at in ("before", "after_one", "after_two"):
        allowed = OF_CPU_ERROR * mean_gap(cpu[at], right[at])
        fault = mean_gap(right["after_one"], right["before"]) if at == "before" else mean_gap(right[at], right["before"])
        step.check(f"log-probs {at}: mean error, nats", mean_gap(mine[at], right[at]), at_most=allowed, wrong=fault)
    step.figure(grad_norm={name: numbers["grad_norm"] for name, numbers in (("cpu float32", right), ("cpu", cpu), ("here", mine))})
    for what, reader, writer in (("cpu to here", loaded, cpu), ("here to cpu", back, mine)):
        step.check(f"checkpoint {what}: the same weights to the bit", reader["checksums"] == writer["checksums"])
        allowed = OF_CPU_ERROR * mean_gap(cpu["after_two"], right["after_two"])
        fault = mean_gap(forgotten["after_two"], right["after_two"])
        name = f"checkpoint {what}: log-probs after another update, nats"
        step.check(name, mean_gap(reader["after_two"], writer["after_two"]), at_most=allowed, wrong=fault)


def speed(record: Record, settings: Settings, work: Path, device: torch.device) -> None:
    """Updates of packed micro-batches of 4,096 tokens, BF16 and each FP8 recipe."""
    model = write_model(work / "speed", settings.speed_shape, **settings.speed)
    seconds: dict[str, float] = {}
    for name in ("bf16", *RECIPES):
        with record.step(f"update, {name}") as step:
            if name != "bf16" and device.type != "cuda":
                raise NotRun("no CUDA: only Transformer Engine computes in FP8")
            fp8 = {} if name == "bf16" else {"fp8": name}
            with where_supported():
                actor, shape = build_policy_of(policy_config(model, model={"initialization": "random", "dtype": "bfloat16", **fp8}))
            samples = made_up(shape.vocab_size, settings.speed_prompt, (settings.speed_response,) * 4, seed=3)
            batches = [packed(samples, actor) for _ in range(settings.micro_batches)]
            update = partial(update_on, actor, batches, 1e-5)
            taken = [wall_seconds(device, update) for _ in range(7)][2:]
            seconds[name] = statistics.median(taken)
            rate = update_flops(shape, batches) / seconds[name] / 1e12
            step.figure(seconds=taken, tokens_a_micro_batch=len(batches[0].tokens), model_tflops=rate)
            if "bf16_tflops" in record.limits:
                step.figure(share_of_measured_bf16_products=rate / record.limits["bf16_tflops"])
            del actor, update
            gc.collect()
            free_device_memory()
    ran = [seconds["bf16"] / value for name, value in seconds.items() if name != "bf16"] if "bf16" in seconds else []
    if ran:
        record.goal("fp8", max(ran))  # whose it is, the steps' seconds say
    else:
        record.open_goal("fp8", "no FP8 recipe ran beside BF16")
