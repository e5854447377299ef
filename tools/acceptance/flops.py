"""Floating-point operations of an update on packed micro-batches, counted as the planner counts them (docs/planning.md).

May import: megatron_nsr.models, planning, types.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from megatron_nsr.models.hf_config import ModelShape
from megatron_nsr.planning.flops import model_flops
from megatron_nsr.planning.workload import Lengths, Workload
from megatron_nsr.types import TrainBatch


def update_flops(shape: ModelShape, batches: Iterable[TrainBatch]) -> float:
    """Forward and backward of all sequences, without what is recomputed. The lengths are those that were run, not the plan's."""
    prompts, responses = sequence_lengths(list(batches))
    return model_flops(shape, _workload(prompts, responses), float((prompts + responses).sum()))


def sequence_lengths(batches: Sequence[TrainBatch]) -> tuple[np.ndarray, np.ndarray]:
    """([sequences], [sequences]): input tokens without a loss, and with one. What only fills a micro-batch up is left out."""
    found = []
    for batch in batches:
        ends = batch.cu_seqlens.cpu().numpy()
        counted = np.concatenate([[0], batch.response_mask.cpu().numpy().cumsum()])
        responses = counted[ends[1:]] - counted[ends[:-1]]
        found.append(np.stack([np.diff(ends) - responses, responses])[:, responses > 0])
    prompts, responses = np.concatenate(found, axis=1).astype(float)
    return prompts, responses


def _workload(prompts: np.ndarray, responses: np.ndarray) -> Workload:
    """Lengths whose mean and mean square are those of the sequences, which is all that the count depends on."""
    whole = prompts + responses
    spread = float(np.sqrt(max(0.0, (whole**2).mean() - whole.mean() ** 2)) / responses.mean())
    # The plan bounds a mean context by the longest possible sequence, which two of the longest ones' length cannot reach.
    lengths = Lengths(float(prompts.mean()), float(responses.mean()), spread, cap=int(2 * whole.max()))
    return Workload(1, 1, 1, 1.0, lengths, old_logprobs=False, reference=False, critic_mini_batches=0)
