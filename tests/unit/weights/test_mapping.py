from __future__ import annotations

import pytest
import torch

from megatron_nsr.weights.mapping import LAYER_ENTRIES, local_parameter

INPUT_NORM = LAYER_ENTRIES["qwen3"][0]


@pytest.mark.parametrize("name", ["input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"])
def test_a_norm_is_found_under_the_name_of_either_backend(name: str) -> None:
    parameters = {f"decoder.layers.{i}.{name}": torch.full((2,), float(i)) for i in range(3)}
    assert local_parameter(INPUT_NORM, 2, parameters) == (f"decoder.layers.2.{name}", parameters[f"decoder.layers.2.{name}"])


def test_a_missing_parameter_is_named_with_both_names() -> None:
    message = (
        r"no parameter decoder\.layers\.1\.input_layernorm\.weight or decoder\.layers\.1\.self_attention\.linear_qkv\.layer_norm_weight"
    )
    with pytest.raises(RuntimeError, match=message):
        local_parameter(INPUT_NORM, 1, {})
