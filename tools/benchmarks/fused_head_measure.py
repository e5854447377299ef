"""One problem for `fused_head.py`, what is right for it in float64, and how time and memory are taken on either device.

May import: torch.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

EPS_LOW, EPS_HIGH, ENTROPY_COEFFICIENT = 0.2, 0.28, 0.01
SEQUENCES = 8  # of equal length, each with one advantage, since some peers know no weights per token
ADVANTAGES = (0.1, -1.0)
# Log-ratios of new to old policy. None is near log(1 - 0.2) or log(1 + 0.28), so that rounding decides no token's clip.
LOG_RATIOS = (-0.45, -0.1, 0.0, 0.1, 0.45)
LOGIT_DEVIATION = 3.0  # entropy near log V - 4.5 nats: some tokens matter, most do not, as in a trained model
LOSSES = ("policy", "policy+entropy", "cross-entropy")
_SAMPLED = 64
_REFERENCE_CHUNK = 256
MIB = 2**20


class Shape(NamedTuple):
    tokens: int
    hidden: int
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one call gave; None for what it does not compute. `loss` is a scalar to call backward on, the others are [tokens]."""

    loss: Tensor | None = None
    logprobs: Tensor | None = None
    entropy: Tensor | None = None


@dataclass(slots=True)
class Problem:
    """hidden [tokens, hidden] and weight [vocabulary, hidden] are leaves that need gradients; advantages [sequences]; the rest [tokens]."""

    shape: Shape
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    advantages: Tensor
    weights: Tensor
    scale: Tensor
    old_logprobs: Tensor

    def loss(self, name: str, logprobs: Tensor, entropy: Tensor | None, rows: slice = slice(None)) -> Tensor:
        """One of LOSSES over these rows, as a sum in which every token of the problem counts 1 / tokens."""
        if name == "cross-entropy":
            return -(logprobs * self.scale[rows]).sum()
        weights = self.weights[rows]
        ratio = (logprobs - self.old_logprobs[rows]).exp()
        losses = -torch.minimum(ratio * weights, ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH) * weights)
        if name == "policy+entropy":
            assert entropy is not None
            losses = losses - ENTROPY_COEFFICIENT * entropy
        return (losses * self.scale[rows]).sum()


def make_problem(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Problem:
    """Random states and weights; targets are drawn from the distribution that they give, as a rollout's tokens are."""
    generator = torch.Generator(device).manual_seed(seed)
    tokens, hidden_size, vocabulary = shape
    hidden = torch.randn(tokens, hidden_size, generator=generator, device=device).to(dtype)
    weight = torch.randn(vocabulary, hidden_size, generator=generator, device=device).mul_(LOGIT_DEVIATION / hidden_size**0.5).to(dtype)
    advantages = torch.tensor(ADVANTAGES, device=device).repeat(SEQUENCES // len(ADVANTAGES))
    choice = torch.randint(len(LOG_RATIOS), (tokens,), generator=generator, device=device)
    problem = Problem(
        shape,
        hidden.requires_grad_(),
        weight.requires_grad_(),
        torch.empty(tokens, dtype=torch.int64, device=device),
        advantages,
        advantages.repeat_interleave(tokens // SEQUENCES),
        torch.full((tokens,), 1 / tokens, device=device),
        -torch.tensor(LOG_RATIOS, device=device)[choice],
    )
    for rows, log_p in _log_softmax(problem, weight.detach().double()):
        problem.targets[rows] = torch.multinomial(log_p.exp(), 1, generator=generator)[:, 0]
        problem.old_logprobs[rows] += log_p.gather(1, problem.targets[rows, None])[:, 0].float()
    return problem


def _log_softmax(problem: Problem, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, log-probs of the whole vocabulary), chunk by chunk, in float64 as `weight` is."""
    for start in range(0, problem.shape.tokens, _REFERENCE_CHUNK):
        rows = slice(start, min(start + _REFERENCE_CHUNK, problem.shape.tokens))
        yield rows, torch.log_softmax(problem.hidden.detach()[rows].double() @ weight.t(), -1)


class Reference:
    """Log-prob, entropy and d_hidden of sampled tokens and d_weight of sampled vocabulary entries, in float64, for each of LOSSES."""

    def __init__(self, problem: Problem, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        tokens, hidden_size, vocabulary = problem.shape
        device = problem.hidden.device
        self.tokens = torch.randperm(tokens, generator=generator)[:_SAMPLED].sort().values.to(device)
        others = torch.randperm(vocabulary, generator=generator)[: _SAMPLED // 2].to(device)
        self.entries = torch.cat((problem.targets[self.tokens[: _SAMPLED // 2]], others)).unique()
        self.logprobs = torch.empty(len(self.tokens), dtype=torch.float64, device=device)
        self.entropy = torch.empty_like(self.logprobs)
        self.d_hidden = {name: self.logprobs.new_empty(len(self.tokens), hidden_size) for name in LOSSES}
        self.d_weight = {name: self.logprobs.new_zeros(len(self.entries), hidden_size) for name in LOSSES}
        weight = problem.weight.detach().double()
        for rows, log_p in _log_softmax(problem, weight):
            self._add(problem, weight, rows, log_p.requires_grad_())

    def _add(self, problem: Problem, weight: Tensor, rows: slice, log_p: Tensor) -> None:
        logprobs = log_p.gather(1, problem.targets[rows, None])[:, 0]
        entropy = -(log_p.exp() * log_p).sum(-1)
        inside = (self.tokens >= rows.start) & (self.tokens < rows.stop)
        local = self.tokens[inside] - rows.start
        self.logprobs[inside], self.entropy[inside] = logprobs.detach()[local], entropy.detach()[local]
        for name in LOSSES:
            (gradient,) = torch.autograd.grad(problem.loss(name, logprobs, entropy, rows), log_p, retain_graph=True)
            # Through the log-softmax: dL/dz = g - p sum(g).
            d_logits = gradient - log_p.detach().exp() * gradient.sum(-1, keepdim=True)
            self.d_hidden[name][inside] = d_logits[local] @ weight
            self.d_weight[name] += d_logits[:, self.entries].t() @ problem.hidden.detach()[rows].double()

    def errors(self, outcome: Outcome) -> dict[str, float]:
        """Largest absolute error of the sampled log-probs and entropies, in nats."""
        pairs = {"logprob_nats": (outcome.logprobs, self.logprobs), "entropy_nats": (outcome.entropy, self.entropy)}
        return {
            name: float((given.detach()[self.tokens].double() - right).abs().max())
            for name, (given, right) in pairs.items()
            if given is not None
        }

    def gradient_errors(self, loss: str, d_hidden: Tensor, d_weight: Tensor) -> dict[str, float]:
        """Norm of the sampled rows' error over the norm of what is right."""
        pairs = {"d_hidden": (d_hidden[self.tokens], self.d_hidden[loss]), "d_weight": (d_weight[self.entries], self.d_weight[loss])}
        return {name: float((given.double() - right).norm() / right.norm()) for name, (given, right) in pairs.items()}


class Meter(Protocol):
    """Takes seconds by each of its clocks, the one to compare first, and the peak of memory above the level before a call."""

    clocks: tuple[str, ...]

    def seconds(self, call: Callable[[], Any]) -> tuple[float, ...]: ...

    def peak_bytes(self, call: Callable[[], Any]) -> int | None: ...


class CpuMeter:
    """CPU seconds of all threads of this process, wall seconds, and the resident set's peak."""

    clocks: tuple[str, ...] = ("cpu_s", "wall_s")

    def seconds(self, call: Callable[[], Any]) -> tuple[float, ...]:
        before = time.process_time(), time.perf_counter()
        call()
        return time.process_time() - before[0], time.perf_counter() - before[1]

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """None where the system is not Linux."""
        reset = Path("/proc/self/clear_refs")
        if not reset.exists():
            return None
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # else a call fills memory that an earlier one freed, and no peak is seen
        reset.write_text("5")  # the peak starts again at the present level (proc(5))
        before = _status_bytes("VmRSS")
        call()
        return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


class CudaMeter:
    """Device seconds between two events, and the allocator's peak."""

    clocks: tuple[str, ...] = ("device_s",)

    def seconds(self, call: Callable[[], Any]) -> tuple[float, ...]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return (start.elapsed_time(end) / 1000,)

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
