from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nsr.models.hf_config import FAMILIES, MixtureOfExperts, ModelShape
from megatron_nsr.weights.mapping import HEAD, LAYER_ENTRIES, Entry, hf_tensor_shape, locate_layer, whole_model_entries

SHAPE = ModelShape(
    family="qwen3",
    num_layers=1,
    hidden=12,
    ffn=20,
    heads=8,
    query_groups=4,
    head_dim=3,
    vocab_size=101,
    tie_embeddings=False,
    norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    qkv_bias=False,
    qk_norm=True,
    max_positions=64,
    initializer_range=0.02,
)
SHAPES = {family: replace(SHAPE, family=family, moe=MixtureOfExperts(3, 2, 7, True) if "moe" in family else None) for family in FAMILIES}
ENTRIES = {f"{family}.{entry.megatron}": (entry, shape) for family, shape in SHAPES.items() for _, entry in whole_model_entries(shape)}


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize(("entry", "shape"), ENTRIES.values(), ids=ENTRIES.keys())
@given(data=st.data())
@settings(max_examples=10)
def test_joining_the_shards_gives_the_tensors_back_bitwise(entry: Entry, shape: ModelShape, tensor: int, data: st.DataObject) -> None:
    shape = replace(
        shape,
        vocab_size=data.draw(st.integers(1, 40)),
        head_dim=data.draw(st.integers(1, 5)),
        heads=4 * data.draw(st.integers(1, 3)),
        hidden=4 * data.draw(st.integers(1, 3)),
        ffn=4 * data.draw(st.integers(1, 3)),
    )
    tensors = [torch.randn(hf_tensor_shape(name, shape)) for name in entry.hf]
    shards = [entry.layout.split(tensors, rank, tensor, shape) for rank in range(tensor)]
    assert len({shard.shape for shard in shards}) == 1
    joined = entry.layout.join(shards, shape)
    assert len(joined) == len(tensors)
    assert all(torch.equal(a, b) for a, b in zip(joined, tensors, strict=True))


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize(("entry", "shape"), ENTRIES.values(), ids=ENTRIES.keys())
def test_the_pieces_of_all_shards_make_the_whole_parameter(entry: Entry, shape: ModelShape, tensor: int) -> None:
    tensors = [torch.randn(hf_tensor_shape(name, shape)) for name in entry.hf]
    ranks = range(tensor if entry.layout.sharded else 1)
    pieces = [piece for rank in ranks for piece in entry.layout.pieces(tensors, rank, tensor, shape)]
    whole = torch.full(entry.layout.whole([tuple(x.shape) for x in tensors], tensor), float("nan"))
    for offset, piece in pieces:
        whole[tuple(slice(start, start + length) for start, length in zip(offset, piece.shape, strict=True))] = piece
    assert sum(piece.numel() for _, piece in pieces) == whole.numel()
    assert all(torch.equal(a, b) for a, b in zip(entry.layout.join([whole], shape), tensors, strict=True))
    unpadded = entry.layout.split(tensors, 0, 1, shape)
    assert torch.equal(whole[: len(unpadded)], unpadded)


def test_padded_rows_are_zero() -> None:
    weight = torch.ones(101, 12)
    last = HEAD.layout.split([weight], 3, 4, SHAPE)
    assert last.shape == (26, 12) and last[:23].eq(1).all() and last[23:].eq(0).all()


def test_a_query_group_lies_together() -> None:
    entry = next(entry for entry in LAYER_ENTRIES["llama"] if "linear_qkv.weight" in entry.megatron)
    queries = torch.arange(8.0).repeat_interleave(3)[:, None].expand(24, 12)
    keys, values = (100.0 * k + torch.arange(4.0).repeat_interleave(3)[:, None].expand(12, 12) for k in (1, 2))
    fused = entry.layout.split([queries, keys, values], 1, 2, SHAPE)
    assert fused[::3, 0].tolist() == [4, 5, 102, 202, 6, 7, 103, 203]


@pytest.mark.parametrize(("pipeline", "virtual"), [(1, 1), (2, 1), (4, 1), (2, 2), (2, 4), (4, 2)])
def test_layers_lie_where_megatron_core_puts_them(pipeline: int, virtual: int) -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    config = TransformerConfig(
        num_layers=8,
        hidden_size=8,
        num_attention_heads=1,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        pipeline_dtype=torch.float32,
    )
    for layer in range(8):
        where = locate_layer(layer, 8, pipeline, virtual)
        vp_stage = where.vp_stage if virtual > 1 else None
        assert get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=where.pipeline_rank) + where.index == layer
