"""The critic under training: it values a step's tokens, turns outcomes into advantages, and learns from the returns.

May import: config, losses, models, the rest of training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from megatron_nsr.config import CriticConfig
from megatron_nsr.losses.value_head import ValueInputs, ValueOutputs
from megatron_nsr.models.backends import Backend
from megatron_nsr.training.context_parallel import own_part
from megatron_nsr.training.critic_metrics import critic_metrics, measure_critic
from megatron_nsr.training.optimizer import set_learning_rate
from megatron_nsr.training.parallel_groups import ParallelGroups
from megatron_nsr.training.scheduled_model import MicroBatches, ScheduledModel
from megatron_nsr.training.token_advantages import whiten, with_advantages
from megatron_nsr.types import TrainBatch


class Critic(ScheduledModel):
    """Works on the policy's packed mini-batches, at the policy's layout."""

    def __init__(
        self,
        chunks: Sequence[Any],
        wrapped: Sequence[Any],
        optimizer: Any,
        backend: Backend,
        groups: ParallelGroups,
        settings: CriticConfig,
        kl_coefficient: float,
    ) -> None:
        super().__init__(chunks, wrapped, optimizer, backend, groups)
        self.settings, self.kl_coefficient = settings, kl_coefficient

    def judge(self, mini_batches: Sequence[MicroBatches]) -> tuple[MicroBatches, ...]:
        """The mini-batches with old values, returns, and advantages in place of the samples' weights, which are their outcomes.

        With a KL coefficient they have log-probs of the policy and of the reference, and what the policy gained is taken from the rewards.
        Only last pipeline stages know them; on the others, which never use them, the mini-batches stay as they are.
        """
        flat = [micro for mini in mini_batches for micro in mini]
        if not flat:
            return ()
        with torch.no_grad():
            outputs = self._run_schedule(flat, [ValueInputs(own_part(micro).response_rows) for micro in flat], forward_only=True)
        judged = [self._with_advantages(micro, output.values) for micro, output in zip(flat, outputs, strict=False)]
        if self.settings.whiten_advantages:
            judged = whiten(judged, self.groups)
        remaining = iter(judged)
        return tuple([next(remaining, micro) for micro in mini] for mini in mini_batches)

    def update(self, mini_batches: Sequence[MicroBatches], learning_rate: float) -> dict[str, float]:
        """One optimizer step a judged mini-batch.

        Raises FloatingPointError when a gradient norm or the loss is not finite, before anything is saved.
        """
        set_learning_rate(self.optimizer, learning_rate)
        sums, grad_norms = [], []
        for micro_batches in mini_batches:
            outputs = self._forward_backward(micro_batches)
            sums.append(measure_critic(micro_batches, outputs))
            grad_norms.append(self._optimizer_step())
        metrics = critic_metrics(sums, grad_norms, self.groups)
        if not math.isfinite(loss := metrics.get("critic/loss", 0.0)):
            raise FloatingPointError(f"critic loss is {loss}: the update was lost; the last checkpoint is unharmed")
        return {"critic/learning_rate": learning_rate, **metrics}

    def _with_advantages(self, micro: TrainBatch, values: torch.Tensor) -> TrainBatch:
        penalties = None
        if self.kl_coefficient:
            assert micro.old_logprobs is not None and micro.reference_logprobs is not None
            penalties = self.kl_coefficient * (micro.old_logprobs - micro.reference_logprobs)
        return with_advantages(micro, values, self.settings.gamma, self.settings.lambda_, penalties)

    def _forward_backward(self, micro_batches: MicroBatches) -> list[ValueOutputs]:
        """Leaves the mini-batch's gradient, summed over all ranks that have a part of it, in the gradient buffers."""
        self._zero_gradients()
        # The schedule divides the loss by the micro-batches, the data-parallel wrapper the gradient by its ranks; what one does for
        # context parallelism the other undoes.
        gradient_scale = float(len(micro_batches) * self.groups.data_size)
        clip = self.settings.value_clip
        parts = [own_part(micro) for micro in micro_batches]
        inputs = [ValueInputs(p.response_rows, p.returns, p.old_values, p.scale, clip, gradient_scale) for p in parts]
        return self._run_schedule(micro_batches, inputs, forward_only=False)


def joined(parts: Sequence[MicroBatches], shares: Sequence[Sequence[float]]) -> tuple[MicroBatches, ...]:
    """The policy's mini-batches, of which the critic's are `parts` with these shares (`StepBatch.shares`); without shares both are one."""
    if not shares:
        return tuple(parts)
    remaining = iter(parts)
    return tuple([replace(micro, scale=micro.scale * share) for share in mini_batch for micro in next(remaining)] for mini_batch in shares)
