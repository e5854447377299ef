"""Part (a): the fused head by its Triton and its torch path against float64, and its benchmark against the peers.

May import: megatron_nsr.losses, torch; Triton in functions. Neither megatron-core nor vLLM is needed.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_nsr.losses.head_tensors import HeadInputs, HeadOptions, HeadOutputs
from megatron_nsr.losses.policy_head import policy_head
from megatron_nsr.losses.reference import reference_loss
from megatron_nsr.losses.shard import VocabularyShard
from megatron_nsr.losses.terms import LossTerms
from tools.acceptance import processes
from tools.acceptance.limits import measure_limits
from tools.acceptance.record import Goal, NotRun, Record, Step

GOALS = {
    "limit": Goal("fused head, forward and backward with entropy: share of the limit of three products", at_least=0.85),
    "peers": Goal("fused head: seconds over those of the fastest peer that computes the same", at_most=1.0),
}
TERMS = {
    "all terms": LossTerms("clipped", 0.2, 0.28, dual_clip=1.5, entropy_coefficient=0.1, kl_coefficient=0.1, correction_cap=1.2),
    "negative log-likelihood": LossTerms("reinforce"),
}
TEMPERATURE = 0.7
# Log-ratios of the policy to the old one, the reference and the engine: none is near a bound, so that rounding decides no clip.
LOG_RATIOS = (-0.45, -0.1, 0.1, 0.45)
ORDINARY = 30.0  # nats, of a log-prob
# Largest errors; gradients as a norm over that of the exact ones. bf16 rounds the gradient of the logits once.
BOUNDS = {torch.float32: {"nats": 2e-4, "gradient": 5e-4}, torch.bfloat16: {"nats": 2e-4, "gradient": 1e-2}}
NAMED_PEERS = ("Liger", "verl", "cut-cross-entropy", "quack", "torch")  # how their names begin
OURS = "policy_head, main_grad"


@dataclass(frozen=True, slots=True)
class Settings:
    tokens: int
    hidden: int
    vocabulary: int
    chunk: int
    benchmark_shapes: tuple[str, ...]  # T,H,V; the first is the one of the goals
    benchmark_rounds: int


GPU = Settings(512, 1024, 151936, 200, ("32768,3584,151936", "4096,2560,151936", "16384,4096,151936"), 3)
DRY = Settings(9, 16, 8500, 4, ("16,32,512",), 1)  # two tiles of the kernels and a bit


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """hidden [tokens, hidden] and weight [vocabulary, hidden] are leaves."""

    hidden: Tensor
    weight: Tensor
    inputs: HeadInputs

    def run(self, terms: LossTerms, kernels: Literal["torch", "triton"], chunk: int) -> tuple[HeadOutputs, Tensor, Tensor]:
        """(outputs, d_hidden, d_weight)"""
        options = HeadOptions(TEMPERATURE, chunk, kernels=kernels)
        outputs = policy_head(self.hidden, self.weight, self.inputs, VocabularyShard(0, len(self.weight)), terms, options)
        return outputs, *torch.autograd.grad(outputs.loss, (self.hidden, self.weight))

    def exact(self, terms: LossTerms) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        hidden, weight = (leaf.detach().double().requires_grad_() for leaf in (self.hidden, self.weight))
        outputs = reference_loss(hidden, weight, self.inputs, terms, TEMPERATURE)
        return outputs, *torch.autograd.grad(outputs["loss"], (hidden, weight))


def run(record: Record, work: Path) -> None:
    settings = DRY if record.dry else GPU
    device = torch.device("cpu" if record.dry else "cuda")
    record.settings = asdict(settings)
    measure_limits(record, device)
    for kernels in ("torch", "triton"):
        with record.step(f"{kernels} path against float64") as step:
            if kernels == "triton" and importlib.util.find_spec("triton") is None:
                raise NotRun("triton is not installed")
            for dtype in BOUNDS:
                for name, case in cases(settings, dtype, device):
                    compare(step, f"{str(dtype).removeprefix('torch.')}, {name}", case, kernels, settings.chunk)
    with record.step("fp8 logits against float64") as step:
        fp8_logits(step, settings, device)
    with record.step("benchmark") as step:
        benchmark(record, step, settings, device, work)


def cases(settings: Settings, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Case]]:
    """Ordinary logits, and some of the size of thousands, whose exponentials overflow unless a maximum is taken off.

    Every other target is drawn as a rollout draws it, the rest are any: of extreme logits the likeliest alone have no gradient.
    """
    for name, spread in (("ordinary logits", 3.0), ("extreme logits", 1000.0)):
        generator = torch.Generator(device).manual_seed(7)

        def normal(*size: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*size, generator=generator, device=device)

        def one_of(values: tuple[float, ...], generator: torch.Generator = generator) -> Tensor:
            places = torch.randint(len(values), (settings.tokens,), generator=generator, device=device)
            return torch.tensor(values, device=device)[places]

        hidden = normal(settings.tokens, settings.hidden).to(dtype).requires_grad_()
        weight = (normal(settings.vocabulary, settings.hidden) * spread / settings.hidden**0.5).to(dtype).requires_grad_()
        log_p = torch.log_softmax(hidden.detach().double() @ weight.detach().double().t() / TEMPERATURE, -1)
        targets = torch.multinomial(log_p.exp(), 1, generator=generator)[:, 0]
        targets[1::2] = torch.randint(settings.vocabulary, targets[1::2].shape, generator=generator, device=device)
        logprobs = log_p.gather(1, targets[:, None])[:, 0]
        scale = torch.rand(settings.tokens, generator=generator, device=device)
        scale[::3] = 0.0  # masked tokens
        old, reference, engine = ((logprobs - one_of(LOG_RATIOS)).float() for _ in range(3))
        yield name, Case(hidden, weight, HeadInputs(targets, normal(settings.tokens), scale, old, reference, engine))


def compare(step: Step, name: str, case: Case, kernels: Literal["torch", "triton"], chunk: int) -> None:
    """The head's every output against float64. Wrong: the next token's targets, or no entropy bonus."""
    bounds = BOUNDS[case.hidden.dtype]
    shifted = replace(case, inputs=replace(case.inputs, targets=case.inputs.targets.roll(1)))
    for terms_name, terms in TERMS.items():
        outputs, *gradients = case.run(terms, kernels, chunk)
        exact, *exact_gradients = case.exact(terms)
        wrong, *shifted_gradients = shifted.exact(terms)
        size = max(1.0, float(exact["logprobs"].detach().abs().max()) / ORDINARY)  # log-probs of thousands are rounded by as much more
        _, *without_bonus = case.exact(replace(terms, entropy_coefficient=0.0))
        step.check(
            f"{name}, {terms_name}: log-prob, nats",
            _largest(outputs.logprobs, exact["logprobs"]),
            at_most=bounds["nats"] * size,
            wrong=_largest(wrong["logprobs"], exact["logprobs"]),
        )
        step.check(
            f"{name}, {terms_name}: entropy, nats",
            _largest(outputs.entropy, exact["entropy"]),
            at_most=bounds["nats"],
            wrong=_largest(torch.zeros_like(exact["entropy"]), exact["entropy"]) if exact["entropy"].max() > 0.1 else None,
        )
        # With ratios in the loss, those of other targets are no numbers where logits are extreme.
        faulty = shifted_gradients if not terms.entropy_coefficient else without_bonus if exact["entropy"].max() > 0.1 else (None, None)
        for what, mine, right, fault in zip(("d_hidden", "d_weight"), gradients, exact_gradients, faulty, strict=True):
            step.check(
                f"{name}, {terms_name}: {what}, relative",
                _relative(mine, right),
                at_most=bounds["gradient"] + bounds["nats"] * size,  # a ratio errs by as much as its log-prob, in nats
                wrong=None if fault is None else _relative(fault, right),
            )
        _, *again = case.run(terms, kernels, chunk)
        step.check(f"{name}, {terms_name}: the same bits again", all(map(torch.equal, gradients, again)))


def fp8_logits(step: Step, settings: Settings, device: torch.device) -> None:
    """model.head_fp8: docs/fused-head.md has the error to expect, which is nothing that a log-prob without FP8 shows."""
    _, case = next(cases(settings, torch.bfloat16, device))
    right, *_ = case.exact(LossTerms())
    inputs, shard, errors = HeadInputs(case.inputs.targets), VocabularyShard(0, len(case.weight)), {}
    for fp8 in (True, False):
        found = policy_head(case.hidden, case.weight, inputs, shard, LossTerms(), HeadOptions(TEMPERATURE, settings.chunk, fp8=fp8))
        errors[fp8] = float((found.logprobs.double() - right["logprobs"]).detach().abs().mean())
    step.check("log-probs, mean error in nats", errors[True], at_most=0.3, at_least=1e-3, wrong=errors[False])


def benchmark(record: Record, step: Step, settings: Settings, device: torch.device, work: Path) -> None:
    """tools/benchmarks/fused_head.py in a process of its own, whose results are kept whole; it writes them after each shape."""
    results = work / "fused_head.json"
    shapes = [argument for shape in settings.benchmark_shapes for argument in ("--shape", shape)]
    command = processes.python(processes.ROOT / "tools" / "benchmarks" / "fused_head.py", "--device", device.type, "--json", results)
    rounds = ["--rounds", str(settings.benchmark_rounds)]
    # Compiling takes minutes on a CPU and says nothing there.
    changes = {"TRITON_INTERPRET": "0"} | ({"TORCH_COMPILE_DISABLE": "1"} if record.dry else {})
    try:
        processes.run([*command, *rounds, *shapes], work / "fused_head.log", record.remaining_s - 20, changes)
    except TimeoutError as late:
        if not results.exists():
            raise
        step.figure(cut_short=str(late).partition(":")[0])  # the shapes that it has measured stand
    found = json.loads(results.read_text(encoding="utf-8"))
    step.figure(shapes=found["shapes"], benchmark_versions=found["versions"])
    judge(record, step, found["shapes"][0])


def judge(record: Record, step: Step, shape: dict[str, Any]) -> None:
    """The goals, from the largest shape's results."""
    clock = "device_s" if shape["dtype"] == "bfloat16" else "cpu_s"
    ran = {(e["name"], e["terms"]): e for e in shape["results"] if e.get("mode") == "forward+backward" and clock in e}
    ours = {terms: entry for (name, terms), entry in ran.items() if name == OURS}
    step.check("results of our own head", len(ours), at_least=2)
    record.goal("limit", ours["policy+entropy"]["fraction_of_limit"])
    ratios: dict[str, float] = {}
    for (name, terms), entry in ran.items():
        if not name.startswith("policy_head"):
            # A peer that gives a mean cross-entropy alone does less: it is held against our loss without entropy.
            mine = ours["policy+entropy" if terms == "policy+entropy" else "policy"]
            ratios[f"{name}, {terms}"] = mine[clock] / entry[clock]
    step.figure(seconds_over_peer=ratios)
    missing = [peer for peer in NAMED_PEERS if not any(name.startswith(peer) for name in ratios)]
    if missing and max(ratios.values()) <= 1:
        record.open_goal("peers", f"faster than all that ran; not run: {', '.join(missing)}")
    else:
        record.goal("peers", max(ratios.values()))


def _largest(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach().double()).abs().max())


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())
