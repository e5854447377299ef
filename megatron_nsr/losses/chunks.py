"""The head's walk over chunks of tokens: logits, their statistics over all shards, their gradient. No [tokens, vocabulary] tensor exists.

May import: the rest of losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from megatron_nsr.losses import torch_rows
from megatron_nsr.losses.head_tensors import HeadOptions
from megatron_nsr.losses.products import HeadWeight, accumulation_dtype
from megatron_nsr.losses.shard import Distribution, VocabularyShard

Rows: TypeAlias = slice | Tensor

# Bytes of fp32 logits that live at once where no chunk is given: on a CPU 256 rows of 32,768 words, measured as fast as more; on a
# GPU about 1,024 rows of 151,936, a guess that no GPU has confirmed yet.
_WORKSPACE = {"cuda": 640 * 2**20, "cpu": 32 * 2**20}
_CHUNK_MULTIPLE, _LARGEST_CHUNK = 64, 8192


class ChunkedHead:
    """A vocabulary shard of the LM head [vocab_shard, hidden], ready for the chunks of one micro-batch."""

    def __init__(self, weight: Tensor, shard: VocabularyShard, options: HeadOptions) -> None:
        self.shard = shard
        self.real = shard.real_rows(len(weight))
        self.weight = HeadWeight(weight[: self.real], fp8=options.fp8)
        self.inverse_temperature = 1.0 / options.temperature
        self.chunk = options.chunk or default_chunk(len(weight), weight.device)
        self.path = row_operations(weight.device, options.kernels)
        self._workspace: Tensor | None = None

    def chunks(self, tokens: int, rows: Tensor | None) -> Iterator[Rows]:
        """The tokens of each chunk; every rank of the shard's group gets as many chunks."""
        if rows is not None:
            return iter(rows.split(self.chunk) if len(rows) else ())
        return (slice(start, min(start + self.chunk, tokens)) for start in range(0, tokens, self.chunk))

    def logits(self, states: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows columns"]:
        """Of the tokens of one chunk, in fp32, valid until those of the next: all chunks use the same memory.

        On a CPU fresh memory for each chunk costs a quarter of the product's time in page faults.
        """
        if self._workspace is None:  # the first chunk is the largest
            self._workspace = torch.empty(len(states), self.real, dtype=accumulation_dtype(states), device=states.device)
        return self.weight.logits(states, self._workspace[: len(states)])

    def statistics(self, logits: Tensor, targets: Tensor, *, entropy: bool) -> Float[Tensor, "shards 4 rows"]:
        """Of every shard."""
        packed = self.path.statistics(logits, self.columns(targets), self.inverse_temperature, entropy=entropy)
        return self.shard.gather_statistics(packed)

    def d_logits(self, logits: Tensor, softmax: Distribution, targets: Tensor, grads: tuple[Tensor, Tensor | None], out: Tensor) -> Tensor:
        """The gradient of the logits before temperature, from those of log-prob and entropy; `out` may be `logits`."""
        return self.path.d_logits(logits, softmax, self.columns(targets), *grads, self.inverse_temperature, out)

    def columns(self, targets: Int[Tensor, "rows"]) -> Int[Tensor, "rows"]:
        """The targets as columns of this shard; those of other shards lie outside it."""
        return targets - self.shard.start

    def gradient_buffer(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """Where the gradient of `logits` goes: over them, unless the products want it in the hidden states' dtype."""
        if self.weight.upcast or logits.dtype == hidden.dtype:
            return logits
        return torch.empty(logits.shape, dtype=hidden.dtype, device=hidden.device)


def default_chunk(vocab_shard: int, device: torch.device) -> int:
    """Tokens whose fp32 logits over the shard fill the workspace of the device."""
    tokens = _WORKSPACE["cuda" if device.type == "cuda" else "cpu"] // (4 * max(1, vocab_shard))
    return max(_CHUNK_MULTIPLE, min(_LARGEST_CHUNK, tokens // _CHUNK_MULTIPLE * _CHUNK_MULTIPLE))


def row_operations(device: torch.device, kernels: str) -> ModuleType:
    """The module with `statistics`, `loss_terms` and `d_logits`."""
    if kernels == "triton" or (kernels == "auto" and device.type == "cuda"):
        from megatron_nsr.losses import triton_rows

        return triton_rows
    return torch_rows
