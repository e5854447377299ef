"""The critic: the policy's trunk with a value head in place of the LM head.

May import: megatron.core, models.policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_nsr.models.policy import PolicyModel


class CriticModel(PolicyModel):
    """One (virtual) pipeline stage; the last one's `output_layer` is one row, hidden -> value, which all tensor-parallel ranks hold.

    The embedding is never an output, also in a family that ties the two. Called as the policy is, with the head of `losses.value_head`.
    """

    output_layer: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"share_embeddings_and_output_weights": False})
        if self.post_process:
            # megatron-core has built an LM head here, which goes now: until then it adds to the peak of memory. Nothing leaves out the
            # head alone, as `post_process` also decides the final norm (GPTModel, megatron-core 0.16.1).
            like = self.output_layer.weight
            self.output_layer = torch.nn.Linear(like.size(1), 1, bias=False, dtype=like.dtype, device=like.device)
            torch.nn.init.zeros_(self.output_layer.weight)
            # Each rank's gradient is of its own tokens then, as that of a norm's weight is: megatron-core sums those.
            self.output_layer.weight.sequence_parallel = self.config.sequence_parallel


@torch.no_grad()
def copy_trunk(critic: Sequence[PolicyModel], policy: Sequence[PolicyModel]) -> None:
    """Gives the critic's chunks the weights of the policy's, which have the same layout; value heads stay as they are."""
    for chunk, source in zip(critic, policy, strict=True):
        weights = dict(source.named_parameters())
        for name, parameter in chunk.named_parameters():
            if not name.startswith("output_layer."):
                parameter.copy_(weights[name])
