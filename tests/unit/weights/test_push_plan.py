"""The plan of a push: buckets that every layout can agree on, and who sends what."""

from __future__ import annotations

import math
from dataclasses import replace
from io import StringIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from megatron_nsr.models.hf_config import Family, MixtureOfExperts, ModelShape, read_model_shape
from megatron_nsr.weights.loading import random_hf_tensors
from megatron_nsr.weights.mapping import hf_names, hf_tensor_shape
from megatron_nsr.weights.push_plan import PushPlan, plan_push
from tests.tiny_models import tiny_config

LAYOUTS = st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 1), (2, 4, 1), (2, 2, 2)])


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    folder = tmp_path_factory.mktemp("model")
    tiny_config("qwen3", tied=False).save_pretrained(folder)
    return read_model_shape(str(folder))


def plan(shape: ModelShape, layout: tuple[int, int, int], bucket_bytes: int) -> PushPlan:
    tensor, pipeline, virtual = layout
    return plan_push(
        shape, tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, element_bytes=2, bucket_bytes=bucket_bytes
    )  # fmt: skip


@given(layout=LAYOUTS, bucket_bytes=st.integers(1, 400_000), family=st.sampled_from(["qwen2", "qwen3", "llama"]), tied=st.booleans())
@settings(max_examples=40)
def test_buckets_keep_to_their_size_to_one_stage_and_to_the_order_of_export(
    shape: ModelShape, layout: tuple[int, int, int], bucket_bytes: int, family: Family, tied: bool
) -> None:
    shape = replace(shape, family=family, tie_embeddings=tied)
    made = plan(shape, layout, bucket_bytes)
    assert [name for bucket in made.buckets for name in bucket.names] == hf_names(shape)
    for bucket in made.buckets:
        assert made.buffer_bytes(bucket) <= bucket_bytes or len(bucket.pieces) == 1
        assert all(piece.where.pipeline_rank == bucket.owner for piece in bucket.pieces)
        for sharded, room in ((True, bucket.slot), (False, bucket.replicated)):
            spans = [(piece.offset, piece.offset + piece.numel) for piece in bucket.pieces if piece.entry.layout.sharded == sharded]
            assert [start for start, _ in spans] == [0, *(end for _, end in spans)][: len(spans)]
            assert room == (spans[-1][1] if spans else 0)


@given(layout=LAYOUTS, bucket_bytes=st.integers(1, 400_000), replicas=st.integers(1, 2))
@settings(max_examples=20)
def test_every_rank_receives_exactly_what_it_lacks(
    shape: ModelShape, layout: tuple[int, int, int], bucket_bytes: int, replicas: int
) -> None:
    made = plan(shape, layout, bucket_bytes)
    world = layout[0] * layout[1] * replicas
    received = dict.fromkeys(range(world), 0)
    for row in made.traffic(world):
        assert row.rank not in (*row.gather_to, *row.broadcast_to)
        for peer in row.gather_to:
            received[peer] += row.gather_bytes
        for peer in row.broadcast_to:
            received[peer] += row.broadcast_bytes
    for row in made.traffic(world):
        owned = [bucket for bucket in made.buckets if bucket.owner == row.stage]
        has = sum(bucket.slot + bucket.replicated for bucket in owned) * made.element_bytes
        assert received[row.rank] + has == sum(made.buffer_bytes(bucket) for bucket in made.buckets)


@given(
    tensor=st.sampled_from([1, 2]),
    pipeline=st.sampled_from([1, 2]),
    expert=st.sampled_from([1, 2, 4]),
    replicas=st.sampled_from([1, 2]),
    bucket_bytes=st.integers(1, 400_000),
)
@settings(max_examples=30)
def test_experts_travel_from_the_rank_that_has_them_and_every_rank_receives_exactly_what_it_lacks(
    shape: ModelShape, tensor: int, pipeline: int, expert: int, replicas: int, bucket_bytes: int
) -> None:
    shape = replace(shape, family="qwen3_moe", moe=MixtureOfExperts(8, 2, 48, True))
    made = plan_push(
        shape, tensor=tensor, pipeline=pipeline, virtual_pipeline=1, expert=expert, element_bytes=2, bucket_bytes=bucket_bytes
    )  # fmt: skip
    assert [name for bucket in made.buckets for name in bucket.names] == hf_names(shape)
    for bucket in made.buckets:
        assert {piece.where.expert_rank for piece in bucket.pieces} == {bucket.expert_owner or 0}
        assert all((piece.entry.expert is None) == (bucket.expert_owner is None) for piece in bucket.pieces)
    world = tensor * pipeline * expert * replicas
    rows = list(made.traffic(world))
    received = dict.fromkeys(range(world), 0)
    for row in rows:
        if row.expert_to:  # the group broadcasts every rank's experts
            assert row.expert_bytes > 0 and len(row.expert_to) == expert - 1
        sends = ((row.gather_to, row.gather_bytes), (row.expert_to, row.expert_bytes), (row.broadcast_to, row.broadcast_bytes))
        for peers, size in sends:
            for peer in peers:
                received[peer] += size
    for row in rows:
        place = row.rank % (world // pipeline)
        owned = [bucket for bucket in made.buckets if bucket.owner == row.stage and bucket.expert_owner in (None, place % expert)]
        has = sum(bucket.slot + bucket.replicated for bucket in owned) * made.element_bytes
        assert received[row.rank] + has == sum(made.buffer_bytes(bucket) for bucket in made.buckets)


def test_the_weights_bytes_are_those_of_the_hf_tensors_without_padding(shape: ModelShape) -> None:
    expected = 2 * sum(math.prod(hf_tensor_shape(name, shape)) for name in random_hf_tensors(shape, 0))
    assert plan(shape, (2, 2, 1), 50_000).tensor_bytes == expected


@given(layout=LAYOUTS, bucket_bytes=st.integers(1, 400_000))
@settings(max_examples=20)
def test_two_buffers_hold_any_two_neighbouring_buckets(shape: ModelShape, layout: tuple[int, int, int], bucket_bytes: int) -> None:
    made = plan(shape, layout, bucket_bytes)
    largest = 2 * (shape.heads + 2 * shape.query_groups) * shape.head_dim * shape.hidden  # bytes of the fused q, k and v
    if layout == (1, 1, 1):
        assert made.buffer_sizes == (0, 0) and made.extra_bytes == largest
        return
    for number, bucket in enumerate(made.buckets):
        assert made.numel(bucket) <= made.buffer_sizes[number % 2]
    whole = max(made.buffer_bytes(bucket) for bucket in made.buckets)
    assert made.extra_bytes <= 2 * whole + largest


def test_a_tied_head_is_no_part_of_the_plan(shape: ModelShape) -> None:
    names = [name for bucket in plan(replace(shape, tie_embeddings=True), (1, 2, 1), 50_000).buckets for name in bucket.names]
    assert names.count("model.embed_tokens.weight") == 1 and "lm_head.weight" not in names


def test_the_printed_plan_says_who_sends_how_much_to_whom(shape: ModelShape) -> None:
    made = plan(shape, (2, 2, 1), 1 << 20)
    out = StringIO()
    Console(file=out, width=120).print(made.describe(8))
    lines = [line.split() for line in out.getvalue().splitlines()]
    sent = {row.rank: row for row in made.traffic(8)}[5]
    assert (sent.gather_to, sent.broadcast_to) == ((4,), (1,))
    assert ["5", "1", "4", f"{sent.gather_bytes / 2**20:.2f}", "1", f"{sent.broadcast_bytes / 2**20:.2f}"] in lines
    assert [line[0] for line in lines if line and line[0].endswith(".weight")] == [bucket.names[0] for bucket in made.buckets]


def test_a_rank_that_has_everything_sends_nothing(shape: ModelShape) -> None:
    rows = list(plan(shape, (1, 1, 1), 1 << 20).traffic(2))
    assert all(row.gather_to == row.broadcast_to == () for row in rows)
