"""The policy under training: measure it on a step's samples, then update it through megatron-core's schedule.

May import: config, models, losses, objectives, weights, the rest of training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_nsr.losses.policy_head import HeadInputs, HeadOutputs
from megatron_nsr.models.backends import Backend
from megatron_nsr.objectives.mini_batches import StepBatch
from megatron_nsr.training.measurements import TokenSums, measure, measure_update, measured_metrics, update_metrics
from megatron_nsr.training.optimizer import set_learning_rate
from megatron_nsr.training.packing import pack_micro_batches, with_old_logprobs
from megatron_nsr.training.parallel_groups import ParallelGroups
from megatron_nsr.types import TrainBatch, Trajectory, WeightedSample

MicroBatches = list[TrainBatch]


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """A step's packed mini-batches of this rank, those without a sample left out, with what was measured on them."""

    mini_batches: tuple[MicroBatches, ...]
    kept: TokenSums
    probed: TokenSums
    probe_weight: float  # dropped samples a measured one stands for


class Actor:
    """Owns the model chunks, their data-parallel wrappers and the optimizer. Every rank calls every method: they contain collectives."""

    def __init__(
        self,
        chunks: Sequence[Any],
        wrapped: Sequence[Any],
        optimizer: Any,
        backend: Backend,
        groups: ParallelGroups,
        *,
        entropy_coefficient: float,
        tokens_per_micro_batch: int,
        dropped_share: float,
        seed: int,
    ) -> None:
        self.chunks = list(chunks)  # the bare model
        self.wrapped, self.optimizer, self.backend, self.groups = list(wrapped), optimizer, backend, groups
        self.entropy_coefficient, self.budget = entropy_coefficient, tokens_per_micro_batch
        self.dropped_share, self.seed = dropped_share, seed
        config = self.wrapped[0].config
        self._count_multiple = config.pipeline_model_parallel_size if config.virtual_pipeline_model_parallel_size else 1
        self._token_multiple = config.tensor_model_parallel_size if config.sequence_parallel else 1

    def prepare(self, batch: StepBatch, step: int) -> PreparedStep:
        """Packs the step and recomputes old log-probs, unless a single mini-batch makes every sample on-policy.

        A fixed random share of the dropped samples is measured too, so that entropy and gap are not biased by sign.
        """
        packed = [self.pack(samples) for samples in batch.mini_batches if samples]
        probe = self._probe(batch.dropped, step)
        probed = self.pack(probe) if probe else []
        kept = TokenSums()
        to_score = [micro for mini in packed for micro in mini] if len(packed) > 1 else []
        outputs = self.score([*to_score, *probed]) if to_score or probed else []
        if to_score:
            kept = measure(to_score, outputs)
            packed = _attach_old_logprobs(packed, outputs)
        return PreparedStep(
            tuple(packed),
            kept,
            measure(probed, outputs[len(to_score) :]),
            len(batch.dropped) / len(probe) if probe else 0.0,
        )

    def update(self, prepared: PreparedStep, learning_rate: float) -> dict[str, float]:
        """One optimizer step a mini-batch; with none it is a no-op that says so (`policy/updates` 0).

        Raises FloatingPointError when a gradient norm is not finite, before anything is saved.
        """
        set_learning_rate(self.optimizer, learning_rate)
        sums, grad_norms, kept = [], [], prepared.kept
        for micro_batches in prepared.mini_batches:
            outputs = self._forward_backward(micro_batches)
            if micro_batches[0].old_logprobs is None:
                kept = measure(micro_batches, outputs)
            sums.append(measure_update(micro_batches, outputs, self.entropy_coefficient))
            grad_norms.append(self._optimizer_step())
        return {
            "policy/learning_rate": learning_rate,
            **measured_metrics(kept, prepared.probed, prepared.probe_weight, self.groups),
            **update_metrics(sums, grad_norms, self.groups),
        }

    def measure_samples(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Entropy and log-prob gap over samples that are not trained on."""
        micro_batches = self.pack([WeightedSample(trajectory, 0.0, 0.0) for trajectory in trajectories])
        return measured_metrics(measure(micro_batches, self.score(micro_batches)), TokenSums(), 0.0, self.groups)

    def score(self, micro_batches: MicroBatches) -> list[HeadOutputs]:
        """Forward only: log-probs and entropy of each micro-batch, on last pipeline stages; elsewhere an empty list."""
        inputs = [HeadInputs(micro.targets) for micro in micro_batches]
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
            device=self.groups.device,
        )

    def _probe(self, dropped: Sequence[Trajectory], step: int) -> list[WeightedSample]:
        count = math.ceil(self.dropped_share * len(dropped))
        rows = np.random.default_rng((self.seed, step)).permutation(len(dropped))[:count]
        return [WeightedSample(dropped[row], 0.0, 0.0) for row in sorted(rows)]

    def _forward_backward(self, micro_batches: MicroBatches) -> list[HeadOutputs]:
        with self.backend.phase():
            for chunk in self.wrapped:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
        # The schedule divides by the micro-batches and the data-parallel wrapper by its ranks; our scale is the whole denominator.
        scale = float(len(micro_batches) * self.groups.data_size)
        inputs = [HeadInputs(m.targets, m.weights, m.scale, m.old_logprobs, scale) for m in micro_batches]
        return self._run(micro_batches, inputs, forward_only=False)

    def _run(self, micro_batches: MicroBatches, inputs: Sequence[HeadInputs], *, forward_only: bool) -> list[HeadOutputs]:
        work = list(zip(micro_batches, inputs, strict=True))
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
        return list(outputs)

    def _optimizer_step(self) -> float:
        with self.backend.phase():
            _, grad_norm, _ = self.optimizer.step()
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"gradient norm is {grad_norm}: the update was lost; the last checkpoint is unharmed")
        return float(grad_norm)


def _forward_step(work: Iterator[tuple[TrainBatch, HeadInputs]], model: Any) -> tuple[Any, Callable[[HeadOutputs], Any]]:
    """What megatron-core's schedule calls for each micro-batch and chunk."""
    batch, inputs = next(work)
    packing = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )
    output = model(batch.tokens[None], batch.positions[None], None, labels=inputs, packed_seq_params=packing)
    return output, lambda head: (head.loss, head)


def _attach_old_logprobs(packed: list[MicroBatches], outputs: Sequence[HeadOutputs]) -> list[MicroBatches]:
    """Gives each micro-batch its log-probs; stages without outputs get zeros, which they never use."""
    remaining = iter(outputs)
    attached = []
    for mini in packed:
        scored = [(micro, next(remaining, None)) for micro in mini]
        attached.append([with_old_logprobs(m, o.logprobs if o else torch.zeros_like(m.rollout_logprobs)) for m, o in scored])
    return attached
