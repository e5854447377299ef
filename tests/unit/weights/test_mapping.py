from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_nsr.weights.mapping import LAYER_ENTRIES, Entry, Location, local_parameter, locate

INPUT_NORM = LAYER_ENTRIES["qwen3"][0]
EXPERT_ENTRIES = tuple(entry for entry in LAYER_ENTRIES["qwen3_moe"] if entry.of_experts)


@pytest.mark.parametrize("name", ["input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"])
def test_a_norm_is_found_under_the_name_of_either_backend(name: str) -> None:
    parameters = {f"decoder.layers.{i}.{name}": torch.full((2,), float(i)) for i in range(3)}
    assert local_parameter(INPUT_NORM, Location(0, 0, 2), parameters) == (
        f"decoder.layers.2.{name}",
        parameters[f"decoder.layers.2.{name}"],
    )


def test_a_missing_parameter_is_named_with_both_names() -> None:
    message = (
        r"no parameter decoder\.layers\.1\.input_layernorm\.weight or decoder\.layers\.1\.self_attention\.linear_qkv\.layer_norm_weight"
    )
    with pytest.raises(RuntimeError, match=message):
        local_parameter(INPUT_NORM, Location(0, 0, 1), {})


@pytest.mark.parametrize("name", ["local_experts.{}.linear_fc1.weight", "linear_fc1.weight{}"])
def test_an_expert_is_found_by_its_number_on_its_rank_under_the_name_of_either_backend(name: str) -> None:
    where = locate(5, EXPERT_ENTRIES[0].of_layer(5, 7), 8, 2, 2, experts_per_rank=3)
    assert where == Location(pipeline_rank=0, vp_stage=1, index=1, expert_rank=2, expert=1)
    parameters = {f"decoder.layers.1.mlp.experts.{name.format(i)}": torch.full((2,), float(i)) for i in range(3)}
    found = f"decoder.layers.1.mlp.experts.{name.format(1)}"
    assert local_parameter(EXPERT_ENTRIES[0], where, parameters) == (found, parameters[found])


@pytest.mark.parametrize("entry", EXPERT_ENTRIES, ids=lambda entry: entry.megatron)
@given(experts_per_rank=st.integers(1, 9), expert=st.integers(0, 99))
def test_every_expert_lives_on_one_rank(entry: Entry, experts_per_rank: int, expert: int) -> None:
    where = locate(0, entry.of_layer(0, expert), 1, 1, 1, experts_per_rank)
    assert where.expert_rank * experts_per_rank + where.expert == expert and where.expert < experts_per_rank
    assert locate(0, entry.of_layer(0, expert), 1, 1, 1) == Location(0, 0, 0, expert=expert)


def test_what_is_no_experts_lives_on_all_expert_parallel_ranks() -> None:
    router = next(entry for entry in LAYER_ENTRIES["qwen3_moe"] if "router" in entry.megatron)
    assert locate(1, router.of_layer(1), 2, 1, 1, experts_per_rank=4) == Location(0, 0, 1)
