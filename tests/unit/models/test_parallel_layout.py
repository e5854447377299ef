from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_nsr.config import ParallelConfig
from megatron_nsr.models.hf_config import MixtureOfExperts, ModelShape
from megatron_nsr.models.parallel import validate_layout
from megatron_nsr.types import UserError

SHAPE = ModelShape(
    family="qwen3",
    num_layers=4,
    hidden=64,
    ffn=96,
    heads=4,
    query_groups=2,
    head_dim=32,
    vocab_size=101,
    tie_embeddings=True,
    norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    qkv_bias=False,
    qk_norm=True,
    max_positions=64,
    initializer_range=0.02,
)


@pytest.mark.parametrize(
    ("fields", "world_size", "message"),
    [
        ({"tensor": 3}, 3, "parallel.tensor=3 does not divide num_attention_heads=4"),
        ({"tensor": 4}, 4, "parallel.tensor=4 does not divide num_key_value_heads=2"),
        ({"tensor": 2, "pipeline": 2}, 6, "parallel.tensor=2 x parallel.pipeline=2 does not divide the 6 processes of this run"),
        ({"tensor": 2}, 1, "does not divide the 1 process of this run; start a multiple of 2"),
        ({"tensor": 2, "context": 3}, 8, "parallel.tensor=2 x parallel.context=3 x parallel.pipeline=1 does not divide the 8 processes"),
        ({"pipeline": 3}, 3, "parallel.pipeline=3 does not divide num_hidden_layers=4"),
        (
            {"pipeline": 2, "virtual_pipeline": 4},
            2,
            "parallel.pipeline=2 x parallel.virtual_pipeline=4 does not divide num_hidden_layers",
        ),
    ],
)
def test_an_impossible_layout_is_named(fields: dict[str, Any], world_size: int, message: str) -> None:
    with pytest.raises(UserError) as error:
        validate_layout(ParallelConfig(**fields), SHAPE, world_size)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tensor": 2},
        {"context": 8},
        {"tensor": 2, "context": 2, "pipeline": 2},
        {"pipeline": 4},
        {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "sequence": True},
    ],
)
def test_a_possible_layout_passes(fields: dict[str, Any]) -> None:
    validate_layout(ParallelConfig(**fields), SHAPE, 8)


EXPERTS = replace(SHAPE, family="qwen3_moe", ffn=97, moe=MixtureOfExperts(experts=6, experts_per_token=2, ffn=5, normalize=True))


@pytest.mark.parametrize(
    ("fields", "shape", "message"),
    [
        ({"expert": 2}, SHAPE, "parallel.expert=2: the model has no experts; it must be 1"),
        ({"expert": 4}, EXPERTS, "parallel.expert=4 does not divide num_experts=6"),
        ({"expert": 3, "pipeline": 2}, EXPERTS, "parallel.expert=3 does not divide the 4 processes of a pipeline stage"),
        ({"tensor": 2}, EXPERTS, "parallel.tensor=2 of a model with experts needs parallel.sequence=true"),
    ],
)
def test_an_impossible_layout_of_experts_is_named(fields: dict[str, Any], shape: ModelShape, message: str) -> None:
    with pytest.raises(UserError) as error:
        validate_layout(ParallelConfig(**fields), shape, 8)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [{"expert": 2}, {"tensor": 2, "sequence": True, "expert": 2}, {"pipeline": 2, "expert": 2}, {"tensor": 2, "sequence": True}],
)
def test_a_possible_layout_of_experts_passes(fields: dict[str, Any]) -> None:
    validate_layout(ParallelConfig(**fields), EXPERTS, 8)  # neither 97 nor 5 is cut over tensor-parallel ranks
