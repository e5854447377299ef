"""Time that vLLM takes for a step's responses: continuous batching of drawn lengths, one engine at a time.

May import: numpy, models, planning. Formulas: docs/planning.md.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_nsr.models.hf_config import ModelShape
from megatron_nsr.planning.flops import attention_products, head_products, layer_products
from megatron_nsr.planning.hardware import INFERENCE_MATMUL_SHARE, LINK_SHARE, MEMORY_SHARE, Gpu
from megatron_nsr.planning.parameters import layer_elements
from megatron_nsr.planning.workload import Lengths

# Of one decoding step, assumptions: scheduling, sampling and log-probs; and the start of an all-reduce over NVLink.
STEP_OVERHEAD_S = 3e-3
ALL_REDUCE_LATENCY_S = 15e-6


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine over `tensor` GPUs. room: sequences that run at once. fp8: weights and products of the layers' linear parts."""

    shape: ModelShape
    gpu: Gpu
    tensor: int
    element: int
    room: int
    cache_per_token: float  # bytes on each GPU
    fp8: bool = False

    def prefill_seconds(self, tokens: float, context: float) -> float:
        """Of prompts, each read once and shared by its samples."""
        return self._seconds(tokens * layer_products(self.shape), tokens * attention_products(self.shape, context), 0.0)

    def step_seconds(self, sequences: float, cached: float) -> float:
        """One token for each of `sequences`, with `cached` tokens' keys and values in their caches together."""
        return max(self.memory_seconds(sequences, cached), self.compute_seconds(sequences, cached)) + self._fixed_seconds(sequences)

    def memory_seconds(self, sequences: float, cached: float) -> float:
        read = self._weights_read(sequences) / self.tensor + cached * self.cache_per_token
        return read / (self.gpu.memory_bandwidth * MEMORY_SHARE)

    def compute_seconds(self, sequences: float, cached: float) -> float:
        scores = attention_products(self.shape, cached)
        return self._seconds(sequences * layer_products(self.shape), scores, sequences * head_products(self.shape))

    def _seconds(self, linear: float, scores: float, head: float) -> float:
        """linear, scores: operations of one layer. Only linear layers compute in FP8."""
        rounded = self.shape.num_layers * linear
        exact = self.shape.num_layers * scores + head
        seconds = rounded / (self.gpu.fp8_flops if self.fp8 else self.gpu.flops) + exact / self.gpu.flops
        return seconds / self.tensor / INFERENCE_MATMUL_SHARE

    def _fixed_seconds(self, sequences: float) -> float:
        if self.tensor == 1:
            return STEP_OVERHEAD_S
        moved = 2 * sequences * self.shape.hidden * self.element * (self.tensor - 1) / self.tensor
        return STEP_OVERHEAD_S + 2 * self.shape.num_layers * (ALL_REDUCE_LATENCY_S + moved / (self.gpu.link_bandwidth * LINK_SHARE))

    def _weights_read(self, sequences: float) -> float:
        """Bytes: of a mixture those experts that some sequence chose, if each chooses evenly."""
        layer, head = layer_elements(self.shape, 1, 1), self.shape.hidden * self.shape.vocab_size
        touched = 1.0
        if self.shape.moe is not None:
            touched = 1 - (1 - self.shape.moe.experts_per_token / self.shape.moe.experts) ** sequences
        layers = self.shape.num_layers * (layer.dense + layer.experts * touched)
        return layers * (1 if self.fp8 else self.element) + head * self.element


@dataclass(frozen=True, slots=True)
class Generation:
    """What one engine did. Seconds; `compute` and `memory` are those of decoding steps bound by either."""

    prefill: float
    decode: float
    memory_bound: float
    tokens: int

    @property
    def seconds(self) -> float:
        return self.prefill + self.decode


def draw_lengths(lengths: Lengths, count: int, seed: Sequence[int]) -> np.ndarray:
    """int64 [count]: response lengths, 1 to lengths.cap; the seed alone decides."""
    variance = np.log1p(lengths.response_spread**2)
    draws = np.random.default_rng(list(seed)).lognormal(np.log(lengths.response_mean) - variance / 2, np.sqrt(variance), count)
    return np.clip(np.rint(draws), 1, lengths.cap).astype(np.int64)


def generate(engine: Engine, prompts: int, prompt_tokens: float, responses: Sequence[int] | np.ndarray) -> Generation:
    """Runs the responses in their order, each starting when there is room, and steps all that run together."""
    running: list[int] = []  # the decoding step at which each one ends
    waiting = iter(responses)
    cached = seconds = memory = 0.0
    step, total = 0, 0

    def admit() -> bool:
        nonlocal cached, total
        length = next(waiting, None)
        if length is None:
            return False
        heapq.heappush(running, step + int(length))
        cached, total = cached + prompt_tokens, total + int(length)
        lengths_of_end.setdefault(step + int(length), []).append(int(length))
        return True

    lengths_of_end: dict[int, list[int]] = {}
    while len(running) < engine.room and admit():
        pass
    while running:
        end = running[0]
        steps, sequences = end - step, len(running)
        halfway = cached + sequences * steps / 2
        each = engine.step_seconds(sequences, halfway)
        seconds += steps * each
        if engine.memory_seconds(sequences, halfway) >= engine.compute_seconds(sequences, halfway):
            memory += steps * each
        cached, step = cached + sequences * steps, end
        for length in lengths_of_end.pop(end):
            heapq.heappop(running)
            cached -= prompt_tokens + length
        while len(running) < engine.room and admit():
            pass
    return Generation(engine.prefill_seconds(prompts * prompt_tokens, prompt_tokens / 2), seconds, memory, total)


def generate_on(engine: Engine, engines: int, prompts: int, samples: int, lengths: Lengths, seed: Sequence[int]) -> list[Generation]:
    """Every engine's part of a step: engine e takes the prompts e, e + engines, ... with all their samples."""
    drawn = draw_lengths(lengths, prompts * samples, seed).reshape(prompts, samples)
    parts = [drawn[index::engines] for index in range(engines)]
    return [generate(engine, len(part), lengths.prompt_mean, part.reshape(-1)) for part in parts]
