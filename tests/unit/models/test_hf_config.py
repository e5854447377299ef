from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_nsr.models.hf_config import Llama3Rope, read_model_shape
from megatron_nsr.types import UserError
from tests.tiny_models import LLAMA3_ROPE, tiny_config

# The fields of Qwen2.5-Math-7B's and Llama 3.1 8B's files that matter, as their publishers write them.
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


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
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
        ({"model_type": "mixtral"}, "model_type='mixtral' is not supported; supported are qwen2, qwen3, llama"),
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
