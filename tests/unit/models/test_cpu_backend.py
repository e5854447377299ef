"""The cpu backend's packed attention: sequences never see one another, whatever lies beside or behind them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType

from megatron_nsr.models.cpu_backend import _positions, _SdpaAttention

LENGTHS = (3, 1, 7, 5)
HEADS, GROUPS, DIM = 4, 2, 8


def cumulative(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    config = SimpleNamespace(context_parallel_size=1, kv_channels=DIM, attention_dropout=0.0)
    module = _SdpaAttention(config, 1, AttnMaskType.causal, "self")  # type: ignore[arg-type]  # reads these three fields
    ends = cumulative(lengths)
    packing = PackedSeqParams(
        qkv_format="sbhd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths)
    )
    return module(query, key, value, None, packed_seq_params=packing)


def inputs(seed: int = 0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(sum(LENGTHS), 1, heads, DIM, generator=draw, requires_grad=True) for heads in (HEADS, GROUPS, GROUPS)]


def plain_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """One sequence, [tokens, 1, heads, dim], in float64."""
    q, k, v = (x[:, 0].double().transpose(0, 1) for x in (query, key, value))
    k, v = (x.repeat_interleave(HEADS // GROUPS, 0) for x in (k, v))
    scores = (q @ k.transpose(1, 2) / math.sqrt(DIM)).masked_fill(torch.ones(q.size(1), q.size(1)).triu(1).bool(), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).reshape(q.size(1), 1, -1)


def test_each_sequence_attends_to_itself_alone() -> None:
    query, key, value = inputs()
    parts = zip(*(x.split(LENGTHS) for x in (query, key, value)), strict=True)
    expected = torch.cat([plain_attention(*part) for part in parts])
    torch.testing.assert_close(attend(query, key, value, LENGTHS), expected.float())


@pytest.mark.parametrize("chosen", range(len(LENGTHS)))
def test_a_sequence_gives_no_gradient_to_the_others(chosen: int) -> None:
    tensors = inputs()
    attend(*tensors, LENGTHS).split(LENGTHS)[chosen].square().sum().backward()
    gradients = [tensor.grad.split(LENGTHS) for tensor in tensors if tensor.grad is not None]
    assert gradients[2][chosen].any()  # of the values: a query that sees one key alone has none
    assert not any(part.any() for parts in gradients for index, part in enumerate(parts) if index != chosen)


def test_what_lies_in_the_other_sequences_changes_nothing() -> None:
    tensors, others = inputs(0), inputs(1)
    start = sum(LENGTHS[:2])
    mixed = [
        torch.cat((other[:start], tensor[start : start + LENGTHS[2]], other[start + LENGTHS[2] :]))
        for tensor, other in zip(tensors, others, strict=True)
    ]
    first, second = (attend(*x, LENGTHS).split(LENGTHS)[2] for x in (tensors, mixed))
    assert torch.equal(first, second)


def test_positions_restart_at_each_sequence() -> None:
    assert _positions(cumulative(LENGTHS)).tolist() == [i for length in LENGTHS for i in range(length)]
