"""Checksums of weights: what they notice, and that shards add up to the whole at every layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nsr.models.hf_config import ModelShape, read_model_shape
from megatron_nsr.weights import checksums
from megatron_nsr.weights.checksums import checksum, hf_shards
from megatron_nsr.weights.loading import random_hf_tensors
from megatron_nsr.weights.push_plan import plan_push
from tests.checksums import whole_checksums
from tests.tiny_models import tiny_config

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def whole(tensor: torch.Tensor, dtype: torch.dtype = torch.float32) -> int:
    return whole_checksums([("w", tensor)], dtype)["w"]


@given(dtype=DTYPES, data=st.data(), chunk=st.sampled_from([1, 7, 1 << 20]))
@settings(max_examples=50)
def test_one_changed_or_two_exchanged_elements_change_the_checksum(dtype: torch.dtype, data: st.DataObject, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksums, "ELEMENTS", chunk)
        rows, columns = data.draw(st.integers(1, 6)), data.draw(st.integers(2, 6))
        tensor = torch.randperm(rows * columns).view(rows, columns).to(dtype) + 1
        first, second = data.draw(st.permutations(range(rows * columns)))[:2]
        changed, exchanged = tensor.clone(), tensor.clone()
        changed.view(-1)[first] += 1
        exchanged.view(-1)[first], exchanged.view(-1)[second] = tensor.view(-1)[second], tensor.view(-1)[first]
        assert len({whole(tensor, dtype), whole(changed, dtype), whole(exchanged, dtype)}) == 3
        assert whole(tensor.t().contiguous().t(), dtype) == whole(tensor, dtype)  # the values count, not how they lie in memory


@given(dtype=DTYPES, row=st.integers(0, 5), column=st.integers(0, 7), chunk=st.sampled_from([1, 7, 1 << 20]))
@settings(max_examples=50)
def test_parts_cut_anywhere_add_up(dtype: torch.dtype, row: int, column: int, chunk: int) -> None:
    tensor = torch.randn(5, 8, generator=torch.Generator().manual_seed(row * 8 + column))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksums, "ELEMENTS", chunk)
        rows = torch.arange(5)
        parts = [
            checksum(tensor[own][:, start : start + width], rows[own], start, dtype)
            for own in (slice(0, row), slice(row, 5))
            for start, width in ((0, column), (column, 8 - column))
            if width
        ]
    assert int(torch.stack(parts).sum()) == whole(tensor, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_smallest_change_of_a_value_shows_and_the_sign_of_zero_does_not(dtype: torch.dtype) -> None:
    one, zero = torch.ones(3, dtype=dtype), torch.zeros(3, dtype=dtype)
    next_up = one * (1 + torch.finfo(dtype).eps)
    assert whole(one, dtype) != whole(next_up, dtype)
    assert whole(zero, dtype) == whole(-zero, dtype) == whole(zero + torch.finfo(dtype).tiny / 2, dtype)
    assert whole(zero, dtype) != whole(zero * float("nan"), dtype)


def test_values_are_compared_in_the_given_type() -> None:
    weight = torch.linspace(-1, 1, 30)
    assert whole(weight, torch.bfloat16) == whole(weight.bfloat16().float(), torch.bfloat16)
    assert whole(weight) != whole(weight.bfloat16().float())


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "llama"])
def shape(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    folder = tmp_path_factory.mktemp("model")
    tiny_config(request.param, tied=False).save_pretrained(folder)
    return read_model_shape(str(folder))


@pytest.mark.parametrize("size", [1, 2])
def test_the_shards_of_tensor_parallel_ranks_add_up_to_the_hf_tensors(shape: ModelShape, size: int) -> None:
    tensors = random_hf_tensors(shape, 3)
    plan = plan_push(shape, tensor=size, pipeline=1, virtual_pipeline=1, element_bytes=4, bucket_bytes=1 << 20)
    sums = dict.fromkeys((name for bucket in plan.buckets for name in bucket.names), 0)
    for piece in (piece for bucket in plan.buckets for piece in bucket.pieces):
        for rank in range(size if piece.entry.layout.sharded else 1):
            parameter = piece.entry.layout.split([tensors[name] for name in piece.entry.hf], rank, size, shape)
            for name, shard, rows, column in hf_shards(piece, parameter, rank, size, shape):
                sums[name] += int(checksum(shard, rows, column, torch.float32))
    expected = whole_checksums(((name, tensors[name]) for name in tensors), torch.float32)
    assert {name: value % 2**64 for name, value in sums.items()} == {name: value % 2**64 for name, value in expected.items()}
