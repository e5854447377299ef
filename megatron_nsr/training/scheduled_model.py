"""A model that trains under megatron-core's pipeline schedule: packed micro-batches through its chunks, and optimizer steps.

The policy (actor.py) and the critic (critic.py) are such models. May import: types, models, platform, training.context_parallel,
training.parallel_groups, megatron-core.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_nsr.models.backends import Backend
from megatron_nsr.models.expert_routing import BalancedPacking, LoadBalancing
from megatron_nsr.platform.host_memory import require_present
from megatron_nsr.training.context_parallel import of_all_tokens
from megatron_nsr.training.parallel_groups import ParallelGroups
from megatron_nsr.types import TrainBatch

MicroBatches = list[TrainBatch]
Work = tuple[TrainBatch, Any, LoadBalancing | None]  # the second is what the model hands to its head as labels


class ScheduledModel:
    """Owns the model chunks, their data-parallel wrappers and the optimizer. Every rank calls every method: they contain collectives."""

    def __init__(self, chunks: Sequence[Any], wrapped: Sequence[Any], optimizer: Any, backend: Backend, groups: ParallelGroups) -> None:
        self.chunks = list(chunks)  # the bare model
        self.wrapped, self.optimizer, self.backend, self.groups = list(wrapped), optimizer, backend, groups

    def _zero_gradients(self) -> None:
        require_present((parameter.main_grad for chunk in self.chunks for parameter in chunk.parameters()), "gradient buffers")
        with self.backend.phase():
            for chunk in self.wrapped:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()

    def _run_schedule(
        self,
        micro_batches: Sequence[TrainBatch],
        labels: Sequence[Any],
        *,
        balancing: Sequence[LoadBalancing] | None = None,
        forward_only: bool,
    ) -> list[Any]:
        """The head's outputs for each micro-batch, on last pipeline stages; elsewhere an empty list. Their `loss` is what is minimised.

        labels: of this rank's tokens (`own_part`); the outputs are of all tokens.
        """
        require_present((parameter for chunk in self.chunks for parameter in chunk.parameters()), "the model's weights")
        balances: Sequence[LoadBalancing | None] = balancing or [None] * len(labels)
        work: list[Work] = list(zip(micro_batches, labels, balances, strict=True))
        several = len(self.wrapped) > 1
        with self.backend.phase():
            outputs = get_forward_backward_func()(
                forward_step_func=_forward_step,
                data_iterator=[iter(work) for _ in self.wrapped] if several else iter(work),
                model=self.wrapped if several else self.wrapped[0],
                num_microbatches=len(work),
                seq_length=len(micro_batches[0].tokens),
                micro_batch_size=1,
                forward_only=forward_only,
            )
        return [of_all_tokens(output, micro, self.groups) for output, micro in zip(outputs, micro_batches, strict=False)]

    def _optimizer_step(self) -> float:
        """Returns the gradient norm. Raises FloatingPointError where it is not finite."""
        with self.backend.phase():
            _, grad_norm, _ = self.optimizer.step()
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"gradient norm is {grad_norm}: the update was lost; the last checkpoint is unharmed")
        return float(grad_norm)


def _forward_step(work: Iterator[Work], model: Any) -> tuple[Any, Callable[[Any], Any]]:
    """What megatron-core's schedule calls for each micro-batch and chunk."""
    batch, labels, balancing = next(work)
    packing = BalancedPacking(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
        # Transformer Engine's context parallelism asks for them, and takes what fills sequences up for tokens like others.
        cu_seqlens_q_padded=None if batch.split is None else batch.cu_seqlens,
        cu_seqlens_kv_padded=None if batch.split is None else batch.cu_seqlens,
        split=batch.split,
        balancing=balancing,
    )
    tokens, positions = packing.mine(batch.tokens), packing.mine(batch.positions)
    output = model(tokens[None], positions[None], None, labels=labels, packed_seq_params=packing)
    # A copy: the schedule divides what it is given in place, and frees its memory where the backend lets it (deallocate_pipeline_outputs).
    return output, lambda head: (head.loss.clone(), head)
