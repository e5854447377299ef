"""model.fp8: what megatron-core gets from it, and which models and layouts are refused before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_nsr.config import ParallelConfig
from megatron_nsr.models.backends import choose_backend
from megatron_nsr.models.fp8 import Fp8, check_fp8, fp8_fields, token_multiple
from megatron_nsr.models.hf_config import ModelShape, read_model_shape
from megatron_nsr.models.policy import transformer_config
from megatron_nsr.types import UserError
from tests.tiny_models import tiny_config


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def shape_of(directory: Path, family: str = "qwen3", **sizes: int) -> ModelShape:
    tiny_config(family, tied=False, **sizes).save_pretrained(directory)
    return read_model_shape(str(directory))


def core_config(fp8: Fp8, **layout: Any) -> TransformerConfig:
    """megatron-core's own checks included."""
    sizes = {"num_layers": 8, "hidden_size": 128, "num_attention_heads": 8}
    return TransformerConfig(**sizes, bf16=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16, **fp8_fields(fp8), **layout)


def refusal(fp8: Fp8, shape: ModelShape, parallel: ParallelConfig) -> str:
    with pytest.raises(UserError) as refused:
        check_fp8(fp8, shape, parallel, "te")
    return str(refused.value)


def test_edge_layers_stay_in_bfloat16_wherever_the_stages_lie() -> None:
    config = core_config(Fp8("tensorwise", 2), pipeline_model_parallel_size=4)
    assert [is_first_last_bf16_layer(config, layer) for layer in range(8)] == [True, True, *[False] * 4, True, True]
    assert not any(is_first_last_bf16_layer(core_config(Fp8("tensorwise")), layer) for layer in range(8))


def test_scales_look_back_at_more_than_the_last_product() -> None:
    config = core_config(Fp8("delayed"))
    assert (config.fp8, config.fp8_recipe, config.fp8_amax_history_len, config.fp8_amax_compute_algo) == ("hybrid", "delayed", 1024, "max")
    assert core_config(Fp8("blockwise")).fp8 == "e4m3"


def test_ranks_agree_on_scales_only_with_those_that_run_the_same_micro_batches() -> None:
    assert core_config(Fp8("delayed")).tp_only_amax_red


@pytest.mark.parametrize(
    ("recipe", "layout", "multiple"),
    [
        ("delayed", {}, 16),
        ("blockwise", {}, 16),
        ("delayed", {"tensor_model_parallel_size": 4}, 16),
        ("tensorwise", {"tensor_model_parallel_size": 4, "sequence_parallel": True}, 64),
        ("blockwise", {"tensor_model_parallel_size": 4, "sequence_parallel": True}, 512),
    ],
)
def test_every_rank_gets_whole_rows(recipe: Any, layout: dict[str, Any], multiple: int) -> None:
    assert token_multiple(core_config(Fp8(recipe), **layout)) == multiple


def test_models_and_layouts_that_fp8_cannot_take_are_refused_by_name(directory: Path) -> None:
    shape = shape_of(directory)
    two, four = ParallelConfig(tensor=2, sequence=True), ParallelConfig(tensor=2, pipeline=4)
    assert refusal(Fp8("tensorwise", 3), shape, ParallelConfig()) == (
        "model.fp8_edge_layers=3: twice that is more than num_hidden_layers=4"
    )
    assert "model.fp8_edge_layers=2 is more than the 1 layers of one of parallel.pipeline=4 stages" in refusal(
        Fp8("tensorwise", 2), shape, four
    )
    assert "hidden_size is 64, which is no multiple of 128, as gathered blocks need; set tensorwise" in refusal(
        Fp8("blockwise"), shape, two
    )
    for fine in (Fp8("tensorwise", 2), Fp8("delayed")):
        check_fp8(fine, shape, two, "te")
    check_fp8(Fp8("blockwise"), shape, ParallelConfig(tensor=2), "te")
    check_fp8(Fp8("blockwise"), shape_of(directory, hidden_size=128), two, "te")


@pytest.mark.parametrize(
    ("family", "sizes", "tensor", "named"),
    [
        ("qwen3", {"hidden_size": 72}, 1, "hidden_size is 72"),
        ("qwen3", {"intermediate_size": 48}, 2, "intermediate_size / parallel.tensor=2 is 24"),
        ("qwen3", {"head_dim": 8}, 4, "num_attention_heads x head_dim / parallel.tensor=4 is 8"),
        ("qwen3", {"head_dim": 8, "num_attention_heads": 8}, 2, "num_key_value_heads x head_dim / parallel.tensor=2 is 8"),
        ("qwen3_moe", {"moe_intermediate_size": 40}, 1, "moe_intermediate_size is 40"),
    ],
)
def test_a_side_that_is_not_whole_is_named(directory: Path, family: str, sizes: dict[str, int], tensor: int, named: str) -> None:
    expected = f"model.fp8=delayed: {named}, which is no multiple of 16, as FP8 products need"
    assert refusal(Fp8("delayed"), shape_of(directory, family, **sizes), ParallelConfig(tensor=tensor)) == expected


def test_only_transformer_engine_computes_in_fp8(directory: Path) -> None:
    with pytest.raises(
        UserError, match=r"model\.fp8=delayed: only Transformer Engine computes in FP8, on a GPU, and this is the cpu backend"
    ):
        transformer_config(
            shape_of(directory),
            ParallelConfig(),
            dtype=torch.bfloat16,
            backend=choose_backend("cpu"),
            recompute="none",
            fp8=Fp8("delayed"),
        )
