"""Weighted samples to packed `thd` micro-batches, balanced by tokens over data-parallel ranks and micro-batches.

May import: types.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from megatron_nsr.types import ContextSplit, TrainBatch, Trajectory, WeightedSample


def sequence_tokens(trajectory: Trajectory) -> int:
    """Input tokens of a sequence: everything but the last one, which is only a target."""
    return len(trajectory.prompt_ids) + trajectory.length - 1


def balance(sizes: Sequence[int], bins: int) -> list[list[int]]:
    """Spreads items over `bins` so that sums are even (longest first, to the emptiest bin); item order is kept within a bin."""
    heap = [(0, index) for index in range(bins)]
    contents: list[list[int]] = [[] for _ in range(bins)]
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        total, index = heapq.heappop(heap)
        contents[index].append(item)
        heapq.heappush(heap, (total + sizes[item], index))
    return [sorted(content) for content in contents]


def split_by_budget(lists: Sequence[Sequence[int]], budget: int, multiple: int) -> list[list[list[int]]]:
    """For each list of sizes balanced bins, of which none exceeds `budget` unless it holds a single item.

    All lists get the same number of bins: the smallest multiple of `multiple` that does for each of them.
    """
    bins = max(1, *(-(-sum(sizes) // budget) for sizes in lists))
    while True:
        bins += -bins % multiple
        splits = [balance(sizes, bins) for sizes in lists]
        if all(_fits(sizes, split, budget) for sizes, split in zip(lists, splits, strict=True)):
            return splits
        bins += 1


def _fits(sizes: Sequence[int], split: Sequence[Sequence[int]], budget: int) -> bool:
    return all(len(content) <= 1 or sum(sizes[i] for i in content) <= budget for content in split)


def pack_micro_batches(
    samples: Sequence[WeightedSample],
    *,
    budget: int,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
    count_multiple: int = 1,
    token_multiple: int = 1,
    context_rank: int = 0,
    context_size: int = 1,
    in_step: bool = False,
    device: torch.device | None = None,
) -> list[TrainBatch]:
    """This data-parallel rank's micro-batches of a mini-batch: at least one, if need be without a real sample.

    budget: tokens a micro-batch, those that fill it up included. count_multiple: of the number of micro-batches (the interleaved schedule
    wants a multiple of the pipeline stages). token_multiple: of the tokens of a context-parallel rank (`models.fp8.token_multiple`).
    context_size: ranks that share a micro-batch's tokens, of which this is `context_rank`; they all get the same ones. in_step: all ranks
    get the same number of micro-batches, as experts of one rank serve the tokens of others.
    """
    sizes = [filled_tokens(s.trajectory, context_size) for s in samples]
    filled_up_to = _token_multiple(token_multiple, context_size)
    budget = max(filled_up_to, budget - budget % filled_up_to)
    shares = balance(sizes, data_parallel_size)
    mine = shares[data_parallel_rank]
    packed = shares if in_step else [mine]
    splits = split_by_budget([[sizes[i] for i in share] for share in packed], budget, count_multiple)
    bins = splits[data_parallel_rank if in_step else 0]
    return [
        pack([samples[mine[i]] for i in content], token_multiple, device, context_rank=context_rank, context_size=context_size)
        for content in bins
    ]


def pack(
    samples: Sequence[WeightedSample],
    token_multiple: int = 1,
    device: torch.device | None = None,
    *,
    context_rank: int = 0,
    context_size: int = 1,
) -> TrainBatch:
    """One micro-batch; see `pack_micro_batches`.

    Masked zeros fill each sequence up to what context-parallel ranks can share. A masked sequence of zeros fills the micro-batch up to
    `token_multiple` a rank (and to one token when it is empty).
    """
    trajectories = [s.trajectory for s in samples]
    filled = [filled_tokens(t, context_size) for t in trajectories]
    total = max(1, sum(filled))
    padding = total + (-total % _token_multiple(token_multiple, context_size)) - sum(filled)
    lengths = [*filled, padding] if padding else filled
    ends = np.cumsum(lengths)
    ids = [np.concatenate([np.asarray(t.prompt_ids, np.int64), t.response_ids]) for t in trajectories]
    per_sequence = {
        "tokens": ([x[:-1] for x in ids], np.int64),
        "targets": ([x[1:] for x in ids], np.int64),
        "response_mask": ([_on_response(t, True) for t in trajectories], np.bool_),
        "weights": ([_on_response(s.trajectory, s.weight) for s in samples], np.float32),
        "scale": ([_on_response(s.trajectory, s.scale) for s in samples], np.float32),
        "rollout_logprobs": ([_on_response(t, t.rollout_logprobs) for t in trajectories], np.float32),
    }
    tensors = {name: _laid_out(parts, ends - lengths, int(ends[-1]), dtype) for name, (parts, dtype) in per_sequence.items()}
    tensors["positions"] = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))
    tensors["response_rows"] = response_rows(tensors["response_mask"])
    tensors["cu_seqlens"] = torch.tensor([0, *ends], dtype=torch.int32)
    split = None
    if context_size > 1:
        order = context_order(torch.tensor(lengths), tensors["positions"], context_size)
        mine = order.chunk(context_size)[context_rank]
        split = ContextSplit(order.to(device), mine.to(device), response_rows(tensors["response_mask"][mine]).to(device))
    return TrainBatch(max_seqlen=max(lengths), split=split, **{name: tensor.to(device) for name, tensor in tensors.items()})


def filled_tokens(trajectory: Trajectory, context_size: int) -> int:
    """Input tokens of a sequence with what fills it up for its context-parallel ranks."""
    tokens = sequence_tokens(trajectory)
    return tokens + -tokens % _pieces(context_size)


def _token_multiple(of_a_rank: int, context_size: int) -> int:
    """What the tokens of a whole micro-batch are a multiple of."""
    return math.lcm(of_a_rank * context_size, _pieces(context_size))


def _pieces(context_size: int) -> int:
    return 2 * context_size if context_size > 1 else 1


def context_order(lengths: torch.Tensor, positions: torch.Tensor, ranks: int) -> torch.Tensor:
    """The `order` of a ContextSplit. lengths: int64 [sequences], multiples of 2 * ranks; positions: int64 [tokens]."""
    piece = positions // torch.repeat_interleave(lengths // (2 * ranks), lengths)
    owner = torch.minimum(piece, 2 * ranks - 1 - piece)
    return owner.argsort(stable=True)


def response_rows(mask: torch.Tensor) -> torch.Tensor:
    """Where a mask on the CPU holds: here and not on the GPU, which would have to be waited for."""
    return mask.nonzero()[:, 0]


def _laid_out(parts: Sequence[np.ndarray], starts: np.ndarray, tokens: int, dtype: npt.DTypeLike) -> torch.Tensor:
    """[tokens]: each part from its start on, zeros elsewhere."""
    row = np.zeros(tokens, dtype)
    for part, start in zip(parts, starts, strict=False):  # the last start may be that of padding
        row[start : start + len(part)] = part
    return torch.from_numpy(row)


def _on_response(trajectory: Trajectory, value: float | bool | np.ndarray) -> np.ndarray:
    """A target-aligned row: `value` on the response's targets, 0 on the prompt's."""
    row = np.zeros(sequence_tokens(trajectory))
    row[len(trajectory.prompt_ids) - 1 :] = value
    return row
