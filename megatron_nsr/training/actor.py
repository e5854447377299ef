"""The policy under training: measure it on a step's samples, then update it through megatron-core's schedule.

May import: config, models, losses, objectives, weights, the rest of training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from megatron_nsr.losses.policy_head import HeadInputs, HeadOutputs
from megatron_nsr.losses.terms import LossTerms
from megatron_nsr.models.backends import Backend
from megatron_nsr.models.expert_routing import LoadBalancing
from megatron_nsr.models.fp8 import token_multiple
from megatron_nsr.objectives.mini_batches import StepBatch
from megatron_nsr.objectives.objective import OwnLoss
from megatron_nsr.training.context_parallel import TokenLoss, on_whole_sequences, own_part
from megatron_nsr.training.load_balancing import aux_loss_metric, balance_mini_batch
from megatron_nsr.training.measurements import TokenSums, measure, measure_update, measured_metrics, update_metrics
from megatron_nsr.training.optimizer import set_learning_rate
from megatron_nsr.training.packing import pack_micro_batches
from megatron_nsr.training.parallel_groups import ParallelGroups
from megatron_nsr.training.reference import ReferenceWeights
from megatron_nsr.training.scheduled_model import MicroBatches, ScheduledModel
from megatron_nsr.training.sign_probe import Gradients, compare_gradients, copied, main_gradients
from megatron_nsr.types import TrainBatch, Trajectory, WeightedSample

HeadWork = tuple[HeadInputs, LossTerms]  # what the model hands to its head as labels


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """A step's packed mini-batches of this rank, those without a sample left out, with what was measured on them."""

    mini_batches: tuple[MicroBatches, ...]
    kept: TokenSums
    probed: TokenSums
    probe_weight: float  # dropped samples a measured one stands for
    sign_norms: bool = False  # also measure what each sign sends into the head
    compare_signs: bool = False  # also measure each sign's whole gradient, on the first mini-batch


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """What is measured beside training, and at which steps; 0 is never. sign_norms_every: gradients of each sign at the head's input.

    probe_every: each sign's whole gradient. kl_every: log-probs of the reference policy, which the actor then has; 1 where the loss or
    PPO's reward needs them.
    dropped_share: of dropped samples, on which entropy and log-prob gap are measured too.
    """

    sign_norms_every: int
    probe_every: int
    kl_every: int
    dropped_share: float
    seed: int


class Actor(ScheduledModel):
    """The policy, what its loss consists of and what is measured beside it."""

    def __init__(
        self,
        chunks: Sequence[Any],
        wrapped: Sequence[Any],
        optimizer: Any,
        backend: Backend,
        groups: ParallelGroups,
        *,
        terms: LossTerms,
        own_loss: OwnLoss | None,
        reference: ReferenceWeights | None,
        tokens_per_micro_batch: int,
        router_aux_loss: float,
        diagnostics: Diagnostics,
    ) -> None:
        super().__init__(chunks, wrapped, optimizer, backend, groups)
        self.terms, self.own_loss, self.reference = terms, own_loss, reference
        self.budget, self.router_aux_loss, self.diagnostics = tokens_per_micro_batch, router_aux_loss, diagnostics
        config = self.wrapped[0].config
        self._in_step = config.expert_model_parallel_size > 1
        self._count_multiple = config.pipeline_model_parallel_size if config.virtual_pipeline_model_parallel_size else 1
        self._token_multiple = token_multiple(config)

    def prepare(self, batch: StepBatch, step: int, *, score: bool = False) -> PreparedStep:
        """Packs the step and recomputes old log-probs, unless a single mini-batch makes every sample on-policy. score: then too.

        A fixed random share of the dropped samples is measured too, so that entropy and gap are not biased by sign. Where there is a
        reference policy, all that is packed gets its log-probs.
        """
        packed = [self.pack(samples) for samples in batch.mini_batches if samples]
        probe = self._probe(batch.dropped, step)
        probed = self.pack(probe) if probe else []
        if _is_due(self.diagnostics.kl_every, step) and (packed or probed):
            *packed, probed = self._with_reference_logprobs([*packed, probed])
        kept = TokenSums()
        to_score = [micro for mini in packed for micro in mini] if len(packed) > 1 or score else []
        outputs = self.score([*to_score, *probed]) if to_score or probed else []
        if to_score:
            kept = measure(to_score, outputs)
            packed = _attach(packed, "old_logprobs", outputs)
        return PreparedStep(
            tuple(packed),
            kept,
            measure(probed, outputs[len(to_score) :]),
            len(batch.dropped) / len(probe) if probe else 0.0,
            sign_norms=_is_due(self.diagnostics.sign_norms_every, step),
            compare_signs=_is_due(self.diagnostics.probe_every, step),
        )

    def update(self, prepared: PreparedStep, learning_rate: float) -> dict[str, float]:
        """One optimizer step a mini-batch; with none it is a no-op that says so (`policy/updates` 0).

        Raises FloatingPointError when a gradient norm or the loss is not finite, before anything is saved.
        """
        set_learning_rate(self.optimizer, learning_rate)
        sums, grad_norms, balanced, kept = [], [], [], prepared.kept
        compared = self._compare_signs(prepared.mini_batches[0]) if prepared.compare_signs and prepared.mini_batches else {}
        for micro_batches in prepared.mini_batches:
            balancing = balance_mini_batch(micro_batches, self.router_aux_loss, self.groups) if self.router_aux_loss else None
            outputs = self._forward_backward(micro_batches, balancing=balancing, sign_norms=prepared.sign_norms)
            if balancing:
                balanced.append(balancing)
            if micro_batches[0].old_logprobs is None:
                kept = measure(micro_batches, outputs)
            sums.append(measure_update(micro_batches, outputs, self.terms))
            grad_norms.append(self._optimizer_step())
        metrics = update_metrics(sums, grad_norms, self.groups)
        if not math.isfinite(loss := metrics.get("policy/loss", 0.0)):  # a clipped token without a log-prob spoils no gradient
            raise FloatingPointError(f"policy loss is {loss}: the update was lost; the last checkpoint is unharmed")
        metrics |= aux_loss_metric(balanced, self.wrapped[0].config.num_layers, self.groups)
        measured = measured_metrics(kept, prepared.probed, prepared.probe_weight, self.groups)
        return {"policy/learning_rate": learning_rate, **measured, **metrics, **compared}

    def measure_samples(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Entropy and log-prob gap over samples that are not trained on."""
        micro_batches = self.pack([WeightedSample(trajectory, 0.0, 0.0) for trajectory in trajectories])
        return measured_metrics(measure(micro_batches, self.score(micro_batches)), TokenSums(), 0.0, self.groups)

    def score(self, micro_batches: MicroBatches, *, entropy: bool = True) -> list[HeadOutputs]:
        """Forward only: log-probs and entropy of each micro-batch, on last pipeline stages; elsewhere an empty list."""
        parts = [own_part(micro) for micro in micro_batches]
        inputs = [HeadInputs(part.targets, rows=part.response_rows, measure_entropy=entropy) for part in parts]
        with torch.no_grad():
            return self._run(micro_batches, inputs, forward_only=True)

    def pack(self, samples: Sequence[WeightedSample]) -> MicroBatches:
        """This data-parallel rank's share of the samples, packed."""
        return pack_micro_batches(
            samples,
            budget=self.budget,
            data_parallel_rank=self.groups.data_rank,
            data_parallel_size=self.groups.data_size,
            count_multiple=self._count_multiple,
            token_multiple=self._token_multiple,
            context_rank=self.groups.context_rank,
            context_size=self.groups.context_size,
            in_step=self._in_step,
            device=self.groups.device,
        )

    def _with_reference_logprobs(self, batches: list[MicroBatches]) -> list[MicroBatches]:
        assert self.reference is not None
        with self.reference.in_model():
            outputs = self.score([micro for batch in batches for micro in batch], entropy=False)
        return _attach(batches, "reference_logprobs", outputs)

    def _probe(self, dropped: Sequence[Trajectory], step: int) -> list[WeightedSample]:
        count = math.ceil(self.diagnostics.dropped_share * len(dropped))
        rows = np.random.default_rng((self.diagnostics.seed, step)).permutation(len(dropped))[:count]
        return [WeightedSample(dropped[row], 0.0, 0.0) for row in sorted(rows)]

    def _compare_signs(self, micro_batches: MicroBatches) -> dict[str, float]:
        """Norms of the gradients of positive and of negative samples, entropy bonus and KL term excluded, and the cosine between them."""
        terms = replace(self.terms, entropy_coefficient=0.0, kl_coefficient=0.0)

        def of_sign(sign: float) -> Gradients:
            one_sign = [replace(m, scale=m.scale * (m.weights * sign > 0)) for m in micro_batches]
            self._forward_backward(one_sign, terms=terms)
            with self.backend.phase():
                return main_gradients(self.optimizer)

        positive = copied(of_sign(1.0))
        return compare_gradients(self.optimizer, positive, of_sign(-1.0), self.groups.device)

    def _forward_backward(
        self,
        micro_batches: MicroBatches,
        *,
        terms: LossTerms | None = None,
        balancing: Sequence[LoadBalancing] | None = None,
        sign_norms: bool = False,
    ) -> list[HeadOutputs]:
        """Leaves the mini-batch's gradient, summed over all ranks that have a part of it, in the gradient buffers."""
        self._zero_gradients()
        count = len(micro_batches)
        # The schedule multiplies the loss by the context-parallel ranks, divides it by the micro-batches and may scale it; the head forms
        # its gradient before that happens.
        loss_gradient = float(self.optimizer.get_loss_scale()) * self.groups.context_size / count
        inputs = [
            HeadInputs(
                part.targets,
                part.weights,
                part.scale,
                part.old_logprobs,
                part.reference_logprobs,
                rollout_logprobs=part.rollout_logprobs,
                rows=part.response_rows,
                own_loss=self._own_loss_of(micro),
                # The data-parallel wrapper divides by its ranks, those of context parallelism among them.
                gradient_scale=float(count * self.groups.data_size),
                loss_gradient=loss_gradient,
                sign_norms=sign_norms,
            )
            for micro, part in zip(micro_batches, map(own_part, micro_batches), strict=True)
        ]
        return self._run(micro_batches, inputs, terms=terms, balancing=balancing, forward_only=False)

    def _own_loss_of(self, micro: TrainBatch) -> TokenLoss | None:
        return on_whole_sequences(partial(self.own_loss.token_loss, batch=micro), micro, self.groups) if self.own_loss else None

    def _run(
        self,
        micro_batches: MicroBatches,
        inputs: Sequence[HeadInputs],
        *,
        terms: LossTerms | None = None,
        balancing: Sequence[LoadBalancing] | None = None,
        forward_only: bool,
    ) -> list[HeadOutputs]:
        labels = [(head_inputs, terms or self.terms) for head_inputs in inputs]
        return self._run_schedule(micro_batches, labels, balancing=balancing, forward_only=forward_only)


def _is_due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _attach(batches: Sequence[MicroBatches], field: str, outputs: Sequence[HeadOutputs]) -> list[MicroBatches]:
    """Gives each micro-batch its log-probs as `field`; stages without outputs get zeros, which they never use."""
    remaining = iter(outputs)
    attached = []
    for batch in batches:
        scored = [(micro, next(remaining, None)) for micro in batch]
        attached.append([replace(m, **{field: o.logprobs if o else torch.zeros_like(m.rollout_logprobs)}) for m, o in scored])
    return attached
