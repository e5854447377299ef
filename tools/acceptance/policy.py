"""Part (b): a megatron-core policy beside Hugging Face's model: log-probs, gradients, one optimizer step, on the backend of this device.

May import: everything.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_nsr.models.hf_config import ModelShape
from megatron_nsr.training.actor import Actor
from megatron_nsr.types import WeightedSample
from megatron_nsr.weights.mapping import chunk_entries
from tools.acceptance import huggingface
from tools.acceptance.limits import measure_limits, wall_seconds
from tools.acceptance.models import write_model
from tools.acceptance.policies import (
    ENTROPY,
    build_policy_of,
    free_device_memory,
    made_up,
    packed,
    policy_config,
    response_logprobs,
    this_backend,
    update_on,
)
from tools.acceptance.record import Goal, NotRun, Record, Step

GOALS: dict[str, Goal] = {}
LEARNING_RATE, DECAY, EPS = 1e-3, 0.1, 1e-8
# In float32; in bf16 no more than twice what Hugging Face's own bf16 model errs, and the fraction of weights that round differently.
LOGPROB_BOUND, GRADIENT_BOUND, OF_HF_ERROR, ROUNDED_OTHERWISE = 1e-4, 1e-3, 2.0, 2e-3

_LLAMA_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 1e4,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_scaling": _LLAMA_ROPE, "tie_word_embeddings": False},
}


@dataclass(frozen=True, slots=True)
class Settings:
    """others: of the families beside qwen2, which has the whole shape."""

    shape: str
    dtype: str
    prompt: int
    responses: tuple[int, ...]
    others: dict[str, Any] = field(default_factory=dict)


GPU = Settings("0.5b", "bfloat16", 64, (700, 33, 1, 400, 250, 500), {"num_hidden_layers": 4, "vocab_size": 32000, "head_dim": 64})
DRY = Settings("tiny", "float32", 5, (30, 1, 12, 7), {"head_dim": 32})


def run(record: Record, work: Path) -> None:
    settings = DRY if record.dry else GPU
    record.settings = asdict(settings)
    backend = this_backend()
    measure_limits(record, backend.device)
    with record.step("backend") as step:
        step.figure(backend=backend.name, cpu_patches="megatron_nsr.platform.cpu_patches" in sys.modules)
        step.check("patches for a CPU are loaded on a CPU alone", step.figures["cpu_patches"] == (backend.device.type == "cpu"))
    for family, fields in FAMILIES.items():
        with record.step(f"{family} beside Hugging Face") as step:
            model = write_model(work / family, settings.shape, **fields, **({} if family == "qwen2" else settings.others))
            huggingface.write_random_weights(model, getattr(torch, settings.dtype))
            Comparison(model, settings, backend.device).run(step)
            free_device_memory()
    with record.step("fused weight-gradient accumulation") as step:
        if backend.name != "te":
            raise NotRun("the cpu backend has none")
        fused_accumulation(step, work / "qwen2", settings)


def config_of(model: Path, dtype: str) -> Any:
    optimizer = {"learning_rate": LEARNING_RATE, "weight_decay": DECAY, "eps": EPS, "gradient_clip": 0.0}
    return policy_config(model, model={"dtype": dtype}, optimizer=optimizer)


class Comparison:
    """One model's log-probs, gradients and update, ours and Hugging Face's."""

    def __init__(self, model: Path, settings: Settings, device: torch.device) -> None:
        self.model, self.settings, self.device = model, settings, device
        self.dtype: torch.dtype = getattr(torch, settings.dtype)

    def run(self, step: Step) -> None:
        actor, shape = build_policy_of(config_of(self.model, self.settings.dtype))
        samples = made_up(shape.vocab_size, self.settings.prompt, self.settings.responses, seed=1)
        exact = huggingface.load(self.model, torch.float32, self.device)
        rounded = None if self.dtype == torch.float32 else huggingface.load(self.model, self.dtype, self.device)
        with torch.no_grad():
            self._logprobs(step, actor, samples, exact, rounded)
        right = huggingface.gradients(exact, samples, ENTROPY)
        wrong = huggingface.gradients(exact, samples, ENTROPY, positive_only=True)
        theirs = huggingface.gradients(rounded, samples, ENTROPY) if rounded is not None else None
        del exact, rounded
        before = {name: weight.clone() for name, weight in hf_weights(actor, shape).items()}
        batch = packed(samples, actor)
        scored = response_logprobs(actor, batch)
        metrics = update_on(actor, [batch], LEARNING_RATE)
        mine = hf_gradients(actor, shape)
        step.figure(loss=metrics["policy/loss"], grad_norm=metrics["policy/grad_norm"], optimizer=optimizer_name(actor))
        step.check("weights and gradients under the same names", before.keys() == mine.keys() == right.keys())
        bound = GRADIENT_BOUND if theirs is None else OF_HF_ERROR * distance(theirs, right)
        step.check("gradient, relative error", distance(mine, right), at_most=bound, wrong=distance(wrong, right))
        worst = max(mine, key=lambda name: distance({name: mine[name]}, right))
        step.figure(worst_gradient={worst: distance({worst: mine[worst]}, right)})
        self._adam(step, before, mine, hf_weights(actor, shape))
        moved = (response_logprobs(actor, batch) - scored).split(list(self.settings.responses))
        step.check("log-probs of positive samples rise", float(torch.cat(moved[::2]).mean()) > 0)
        step.check("log-probs of negative samples fall", float(torch.cat(moved[1::2]).mean()) < 0)
        if self.device.type == "cuda":
            name = optimizer_name(actor)
            fused = any(find_spec(package) for package in ("transformer_engine", "apex"))
            step.check("the optimizer is a fused one where one is installed", not fused or name.startswith(("transformer_engine", "apex")))
            step.figure(peak_gib=torch.cuda.max_memory_allocated() / 2**30)

    def _logprobs(self, step: Step, actor: Actor, samples: list[WeightedSample], exact: Any, rounded: Any) -> None:
        right, _ = huggingface.logprobs_and_entropy(exact, samples)
        unpacked, _ = huggingface.logprobs_and_entropy(exact, samples, as_one_sequence=True)
        mine = response_logprobs(actor, packed(samples, actor))
        bound = LOGPROB_BOUND
        if rounded is not None:
            theirs, _ = huggingface.logprobs_and_entropy(rounded, samples)
            bound = OF_HF_ERROR * mean_gap(theirs, right)
        step.check("log-probs, mean error in nats", mean_gap(mine, right), at_most=bound, wrong=mean_gap(unpacked, right))

    def _adam(self, step: Step, before: Mapping[str, Tensor], gradients: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
        """AdamW's first step in closed form, p - lr (g / (|g| + eps) + decay p), from our own gradient; norms and biases do not decay."""
        different = unmoved = total = 0
        for name, old in before.items():
            weight, gradient = old.double(), gradients[name].double()
            decay = DECAY if weight.ndim > 1 else 0.0
            expected = (weight - LEARNING_RATE * (gradient / (gradient.abs() + EPS) + decay * weight)).to(self.dtype)
            tolerance = 1e-3 * LEARNING_RATE if self.dtype == torch.float32 else 0.0
            different += int(((after[name].double() - expected.double()).abs() > tolerance).sum())
            unmoved += int(((old.double() - expected.double()).abs() > tolerance).sum())
            total += weight.numel()
        step.check("weights other than AdamW's, share", different / total, at_most=ROUNDED_OTHERWISE, wrong=unmoved / total)


def hf_weights(actor: Actor, shape: ModelShape) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for _, entry, _, parameter in chunk_entries(actor.chunks, shape):
        found |= dict(zip(entry.hf, entry.layout.join([parameter.detach()], shape), strict=True))
    return found


def hf_gradients(actor: Actor, shape: ModelShape) -> dict[str, Tensor]:
    """The accumulated fp32 gradients under Hugging Face's names, of a policy on one rank."""
    found: dict[str, Tensor] = {}
    for _, entry, _, parameter in chunk_entries(actor.chunks, shape):
        found |= dict(zip(entry.hf, entry.layout.join([parameter.main_grad], shape), strict=True))
    return found


def fused_accumulation(step: Step, model: Path, settings: Settings) -> None:
    """Weight gradients that Transformer Engine adds to the fp32 buffer in its own product, and those that torch adds to it."""
    from megatron.core.tensor_parallel import layers

    from megatron_nsr.models.te_backend import TransformerEngineBackend

    if not layers._grad_accum_fusion_available:
        raise NotRun("Apex's fused_weight_gradient_mlp_cuda is not installed, without which megatron-core fuses none")

    class Backend(TransformerEngineBackend):
        def __init__(self, fusion: bool) -> None:
            super().__init__()
            self.fusion = fusion

        def config_overrides(self) -> dict[str, Any]:
            return super().config_overrides() | {"gradient_accumulation_fusion": self.fusion}

    found, seconds = [], {}
    for kind, backend in (("apart", Backend(False)), ("fused", Backend(True))):
        actor, shape = build_policy_of(config_of(model, settings.dtype), backend)
        batch = packed(made_up(shape.vocab_size, settings.prompt, settings.responses, seed=1), actor)
        update_on(actor, [batch], 0.0)  # two micro-batches below: accumulation is what is asked about
        update_on(actor, [batch, batch], 0.0)
        found.append({name: gradient.cpu() for name, gradient in hf_gradients(actor, shape).items()})
        update = partial(update_on, actor, [batch, batch], 0.0)
        seconds[kind] = min(wall_seconds(backend.device, update) for _ in range(5))
        del actor, update
        gc.collect()
        free_device_memory()
    step.figure(update_seconds=seconds)
    apart, fused = found
    step.check(
        "gradient, relative error", distance(fused, apart), at_most=0.01, wrong=distance({n: g / 2 for n, g in apart.items()}, apart)
    )


def optimizer_name(actor: Actor) -> str:
    kind = type(actor.optimizer.chained_optimizers[0].optimizer)
    return f"{kind.__module__}.{kind.__qualname__}"


def mean_gap(got: Tensor, want: Tensor) -> float:
    return float((got.double().cpu() - want.double().cpu()).abs().mean())


def distance(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    """The norm of all differences over that of what is right, over the tensors in `got`."""
    off = sum(float((got[name].to(want[name]).double() - want[name].double()).square().sum()) for name in got)
    return math.sqrt(off / sum(float(want[name].double().square().sum()) for name in got))
