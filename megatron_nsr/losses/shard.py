"""A rank's part of the vocabulary, and what the ranks that share it tell one another.

May import: torch.distributed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class VocabularyShard:
    """Which rows of the LM head this rank holds: global rows start ... start + len(weight), of which those below `size` are real.

    group: the ranks that share the vocabulary (tensor parallelism). sequence_parallel: each of them holds its part of the tokens'
    hidden states, in rank order; otherwise each holds all of them.
    """

    start: int
    size: int
    group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False

    def real_rows(self, rows: int) -> int:
        """How many of this shard's rows are real; the rest pads the vocabulary to a multiple of the ranks."""
        return max(0, min(rows, self.size - self.start))

    @property
    def ranks(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    def all_tokens(self, hidden: Float[Tensor, "part hidden"]) -> Float[Tensor, "tokens hidden"]:
        """The hidden states of all tokens."""
        if self.ranks == 1 or not self.sequence_parallel:
            return hidden
        whole = hidden.new_empty(self.ranks * len(hidden), hidden.shape[1])
        dist.all_gather_into_tensor(whole, hidden.contiguous(), group=self.group)
        return whole

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """In place: the sum of what each rank's rows contribute."""
        if self.ranks > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def reduce_to_tokens(self, d_hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "part hidden"]:
        """The whole gradient of this rank's hidden states, from every rank's part of it; overwrites its argument."""
        if self.ranks == 1 or not self.sequence_parallel:
            return self.sum_over_ranks(d_hidden)
        part = d_hidden.new_empty(len(d_hidden) // self.ranks, d_hidden.shape[1])
        dist.reduce_scatter_tensor(part, d_hidden, group=self.group)
        return part

    def gather_statistics(self, packed: Float[Tensor, "4 rows"]) -> Float[Tensor, "shards 4 rows"]:
        """Every shard's four numbers a token: one packed all-gather."""
        if self.ranks == 1:
            return packed[None]
        gathered = packed.new_empty(self.ranks * 4, packed.shape[1])
        dist.all_gather_into_tensor(gathered, packed, group=self.group)
        return gathered.view(self.ranks, 4, -1)


@dataclass(frozen=True, slots=True)
class Distribution:
    """A token's softmax over the whole vocabulary: p_v = exp(z_v - maximum - log_total), and the target's log-prob in it."""

    maximum: Float[Tensor, "rows"]
    log_total: Float[Tensor, "rows"]
    logprob: Float[Tensor, "rows"]
    entropy: Float[Tensor, "rows"]

    def part(self, rows: slice | Tensor) -> Distribution:
        return Distribution(self.maximum[rows], self.log_total[rows], self.logprob[rows], self.entropy[rows])


def merge(gathered: Float[Tensor, "shards 4 rows"]) -> Distribution:
    """Joins the shards' (maximum m, S = sum exp(z - m), U = sum exp(z - m) (z - m), target's logit).

    The entropy is log S - U / S: centred on the maximum, so that an offset common to all logits costs no precision. For the same
    reason nothing is ever formed as z - (m + log S).
    """
    maxima, totals, centreds, targets = gathered.unbind(1)
    maximum = maxima.amax(0)
    shift = (maxima - maximum).clamp_min(torch.finfo(gathered.dtype).min)  # -inf * 0 of a shard of padding only is no number
    factor = shift.exp()
    total = (factor * totals).sum(0)
    centred = (factor * (centreds + shift * totals)).sum(0)
    log_total = total.log()
    return Distribution(maximum, log_total, targets.amax(0) - maximum - log_total, log_total - centred / total)
