"""The router of a mixture of experts, with a load-balancing loss that does not depend on how sequences are packed.

May import: megatron.core, models.context_parallel. Both backends build their layers from `RoutedLayer` and `BalancedRouter`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_nsr.models.context_parallel import SplitPacking


@dataclass(slots=True)
class LoadBalancing:
    """The load-balancing loss of one micro-batch.

    shares: what each packed sequence counts in the loss, float32 [sequences]; padding counts 0.
    lengths: each sequence's tokens, int64 [sequences], at least 1; tokens that only fill a sequence up are none of them.
    sequences: which sequence each token belongs to, int64 [tokens]; tokens that only fill one up belong to number `len(lengths)`.
    gradient: factor of the loss's gradient: the coefficient, times what megatron-core divides gradients by.
    found: the loss of each layer of this rank that ran, without `gradient`; of this rank's tokens only, where others have other tokens.
    """

    shares: Tensor
    lengths: Tensor
    sequences: Tensor
    gradient: float
    found: list[Tensor] = field(default_factory=list)


@dataclass
class BalancedPacking(SplitPacking):
    """Packed sequences of a micro-batch whose routers add a load-balancing loss."""

    balancing: LoadBalancing | None = None


class BalancedRouter(TopKRouter):
    """megatron-core's router, whose own auxiliary losses are averaged over a micro-batch: other packing, another loss."""

    packing: PackedSeqParams | None = None  # of the micro-batch at hand

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(each token's weights of its experts, which experts those are), both [tokens, experts], from logits [tokens, 1, experts]."""
        probs, routing_map = super().routing(logits, padding_mask)
        balancing = self.packing.balancing if isinstance(self.packing, BalancedPacking) else None
        if balancing is None or not torch.is_grad_enabled():  # without gradients: the first pass of a layer that is recomputed
            return probs, routing_map
        losses = self._sequence_losses(logits.flatten(0, -2), routing_map, balancing)
        loss = (losses * balancing.shares).sum()
        balancing.found.append(loss.detach())
        return MoEAuxLossAutoScaler.apply(probs, loss * balancing.gradient), routing_map

    def _sequence_losses(self, logits: Tensor, routing_map: Tensor, balancing: LoadBalancing) -> Tensor:
        """[sequences]; where other ranks have other tokens the parts of this rank's, which add up to the losses over the ranks."""
        assert isinstance(self.packing, BalancedPacking)
        count, sequences = len(balancing.lengths), self.packing.mine(balancing.sequences)
        if self.config.sequence_parallel:
            sequences = sequences.chunk(self.tp_group.size())[self.tp_group.rank()]
        chosen = sum_by_sequence(routing_map.float(), sequences, count + 1)[:count]
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(chosen, group=self.tp_cp_group)
        scores = sum_by_sequence(logits.softmax(dim=-1, dtype=torch.float32), sequences, count + 1)[:count]
        return load_balancing_losses(scores, chosen, balancing.lengths, self.topk)


def sum_by_sequence(values: Tensor, sequences: Tensor, count: int) -> Tensor:
    """[count, experts] from values [tokens, experts] and each token's sequence [tokens]."""
    return values.new_zeros(count, values.size(1)).index_add(0, sequences, values)


def load_balancing_losses(scores: Tensor, chosen: Tensor, lengths: Tensor, experts_per_token: int) -> Tensor:
    """Each sequence's load-balancing loss [sequences]: 1 where experts are used evenly, more where they are not.

        experts * sum over experts of f P        f: share of the choices, P: mean probability      (arXiv 2101.03961, equation 4)

    scores: probabilities of the softmax over all experts, summed over a sequence's tokens [sequences, experts]; only they have a gradient.
    chosen: how many of its tokens chose the expert [sequences, experts].
    """
    shares = chosen / (experts_per_token * lengths[:, None])
    return scores.size(1) * (shares * scores / lengths[:, None]).sum(dim=1)


class RoutedLayer(TransformerLayer):
    """A transformer layer that tells its router which sequences the tokens belong to.

    The packing is set in each forward pass, so that a layer that is recomputed sees its own micro-batch's again.
    """

    def forward(self, *args: Any, packed_seq_params: PackedSeqParams | None = None, **kwargs: Any) -> Any:
        self.mlp.router.packing = packed_seq_params
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)
