from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_nsr.models.hf_config import Llama3Rope, MixtureOfExperts, read_model_shape
from megatron_nsr.types import UserError
from megatron_nsr.weights.mapping import hf_names, hf_tensor_shape
from tests.tiny_models import LLAMA3_ROPE, tiny_config

# The fields of their files that matter, as their publishers write them.
QWEN_MATH_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 4096,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
LLAMA_8B = {
    "model_type": "llama",
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}

QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_235B_A22B = QWEN3_30B_A3B | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_window_layers": 94,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 64,
    "num_hidden_layers": 94,
}


def write(folder: Path, values: dict[str, Any], **changes: Any) -> str:
    (folder / "config.json").write_text(json.dumps(values | changes))
    return str(folder)


def test_qwen_math_file(tmp_path: Path) -> None:
    shape = read_model_shape(write(tmp_path, QWEN_MATH_7B))
    assert (shape.family, shape.num_layers, shape.hidden, shape.ffn) == ("qwen2", 28, 3584, 18944)
    assert (shape.heads, shape.query_groups, shape.head_dim, shape.vocab_size) == (28, 4, 128, 152064)
    assert shape.qkv_bias and not shape.qk_norm and not shape.tie_embeddings
    assert (shape.rope_theta, shape.rope_scaling) == (10000.0, None)


def test_llama_file_with_scaled_rope(tmp_path: Path) -> None:
    shape = read_model_shape(write(tmp_path, LLAMA_8B))
    assert (shape.family, shape.head_dim, shape.query_groups, shape.norm_eps) == ("llama", 128, 8, 1e-5)
    assert (shape.rope_theta, shape.rope_scaling) == (500000.0, Llama3Rope(8.0, 1.0, 4.0, 8192))
    assert not shape.qkv_bias


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "qwen3_moe"])
def test_files_as_transformers_writes_them_today(tmp_path: Path, family: str) -> None:
    config = tiny_config(family, tied=True, rope_parameters={"rope_type": "default", "rope_theta": 12345.0})
    config.save_pretrained(tmp_path)
    shape = read_model_shape(str(tmp_path))
    assert (shape.family, shape.rope_theta, shape.rope_scaling) == (family, 12345.0, None)
    assert (shape.head_dim, shape.vocab_size, shape.tie_embeddings) == (32, 101, True)


def test_new_spelling_of_scaled_rope(tmp_path: Path) -> None:
    tiny_config("llama", tied=False, rope_parameters=LLAMA3_ROPE).save_pretrained(tmp_path)
    assert read_model_shape(str(tmp_path)).rope_scaling == Llama3Rope(8.0, 1.0, 4.0, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "model_type='mixtral' is not supported; supported are qwen2, qwen3, llama, qwen3_moe"),
        ({"use_sliding_window": True, "max_window_layers": 14}, "sliding window attention is in use"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding window attention is in use"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type='yarn' is not supported, only default and llama3"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "needs low_freq_factor, high_freq_factor, original_max"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only silu"),
        ({"quantization_config": {"bits": 4}}, "quantized weights are not supported"),
        ({"hidden_size": "3584"}, "hidden_size='3584': a positive integer is needed"),
        ({"vocab_size": None}, "vocab_size=None: a positive integer is needed"),
        ({"num_key_value_heads": 5}, "num_key_value_heads=5 does not divide num_attention_heads=28"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=r"model\.path=") as error:
        read_model_shape(write(tmp_path, QWEN_MATH_7B, **changes))
    assert message in str(error.value)


def test_a_sliding_window_that_no_layer_uses_is_fine(tmp_path: Path) -> None:
    assert read_model_shape(write(tmp_path, QWEN_MATH_7B, use_sliding_window=True, max_window_layers=28)).num_layers == 28


def test_attention_bias_of_llama_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="attention_bias=true is not supported for llama"):
        read_model_shape(write(tmp_path, LLAMA_8B, attention_bias=True))


def test_missing_directory_file_and_broken_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.path=.*nowhere: no such directory"):
        read_model_shape(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"no config\.json in it"):
        read_model_shape(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        read_model_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json is not a JSON object"):
        read_model_shape(str(tmp_path))


@pytest.mark.parametrize(
    ("values", "total", "active"),  # billions, as the model cards say
    [(QWEN3_30B_A3B, 30.5, 3.3), (QWEN3_235B_A22B, 235, 22)],
    ids=["30B-A3B", "235B-A22B"],
)
def test_published_mixtures_of_experts_have_their_published_size(
    tmp_path: Path, values: dict[str, Any], total: float, active: float
) -> None:
    shape = read_model_shape(write(tmp_path, values))
    assert (shape.family, shape.query_groups, shape.head_dim, shape.qk_norm, shape.qkv_bias) == ("qwen3_moe", 4, 128, True, False)
    assert shape.moe == MixtureOfExperts(128, 8, values["moe_intermediate_size"], True)
    counts = {name: math.prod(hf_tensor_shape(name, shape)) for name in hf_names(shape)}
    in_experts = sum(count for name, count in counts.items() if ".mlp.experts." in name)
    assert sum(counts.values()) / 1e9 == pytest.approx(total, rel=2e-3)
    assert (sum(counts.values()) - in_experts * (1 - 8 / 128)) / 1e9 == pytest.approx(active, rel=2e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step=2, mlp_only_layers=[]: layers without experts are not supported"),
        ({"mlp_only_layers": [0]}, "decoder_sparse_step=1, mlp_only_layers=[0]: layers without experts are not supported"),
        ({"num_experts": None}, "num_experts=None: a positive integer is needed"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size=None: a positive integer is needed"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok=129 exceeds num_experts=128"),
        ({"num_experts_per_tok": 1}, "norm_topk_prob=true with num_experts_per_tok=1 is not supported"),
        ({"attention_bias": True}, "attention_bias=true is not supported for qwen3_moe"),
    ],
)
def test_what_is_not_supported_of_a_mixture_of_experts_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        read_model_shape(write(tmp_path, QWEN3_30B_A3B, **changes))
    assert message in str(error.value)


def test_experts_are_counted_under_either_name(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    tiny_config("qwen3_moe", tied=False).save_pretrained(tmp_path / "new")
    for path in (str(tmp_path / "new"), write(tmp_path, QWEN3_30B_A3B, num_experts=8)):
        moe = read_model_shape(path).moe
        assert moe is not None and moe.experts == 8
