"""Context parallelism: ranks that share the tokens of each packed sequence, and the gather that shows them the others' tokens.

May import: megatron.core, types. Tokens are shared as megatron-core's rotary embedding of `thd` and Transformer Engine's attention expect
it (its thd_get_partitioned_indices); `types.ContextSplit` describes that, `training.packing` makes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_nsr.types import ContextSplit


@dataclass
class SplitPacking(PackedSeqParams):
    """Packed sequences, of which this rank has its part of the tokens; `cu_seqlens_q` and its like are of the whole sequences."""

    split: ContextSplit | None = None  # None: this rank has all tokens

    def mine(self, values: Tensor) -> Tensor:
        """This rank's part of values [tokens, ...]."""
        return values if self.split is None else values[self.split.mine]


def all_tokens(part: Float[Tensor, "part ..."], split: ContextSplit, group: dist.ProcessGroup) -> Float[Tensor, "tokens ..."]:
    """The values of all ranks' tokens, in the order of the packed sequences.

    Each rank's loss may depend on all of them: the gradient of a rank's own values is summed over the ranks.
    """
    return _AllTokens.apply(part, split, group)


class _AllTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, split: ContextSplit, group: dist.ProcessGroup) -> Tensor:
        ctx.split, ctx.group = split, group
        gathered = part.new_empty(len(split.order), *part.shape[1:])
        dist.all_gather_into_tensor(gathered, part.contiguous(), group=group)
        return torch.empty_like(gathered).index_copy_(0, split.order, gathered)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ordered = grads[0][ctx.split.order]
        part = ordered.new_empty(len(ctx.split.mine), *ordered.shape[1:])
        dist.reduce_scatter_tensor(part, ordered, group=ctx.group)
        return part, None, None
