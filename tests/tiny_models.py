"""Tiny random Hugging Face models of every family, written as directories, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

ARCHITECTURES = {
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def tiny_config(family: str, *, tied: bool, vocab_size: int = 101, layers: int = 4, **fields: Any) -> Any:
    """A configuration of a few thousand parameters; the vocabulary is odd so that it needs padding under tensor parallelism."""
    config_class, _ = ARCHITECTURES[family]
    values = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 1,
        "bos_token_id": None,
        "pad_token_id": 0,
    }
    if family == "qwen3_moe":
        values |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
    return config_class(**(values | fields))


def tiny_model(config: Any, seed: int = 0) -> transformers.PreTrainedModel:
    """A float32 model whose every weight matters: norms and biases are random too, and logits are of order one."""
    _, model_class = ARCHITECTURES[config.model_type]
    generator = torch.Generator().manual_seed(seed)
    model = model_class._from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(1 + 0.1 * noise if "norm" in name else 0.1 * noise)
    return model


def write_tiny_model(path: Path, family: str, *, tied: bool, **fields: Any) -> transformers.PreTrainedModel:
    """Saves a tiny model as transformers does, and returns it."""
    model = tiny_model(tiny_config(family, tied=tied, **fields))
    model.save_pretrained(path)
    return model


def packed_logits(model: transformers.PreTrainedModel, lengths: list[int], tokens: torch.Tensor) -> torch.Tensor:
    """HF's logits [tokens, vocab] of sequences that lie one after another in `tokens`, each run alone."""
    return torch.cat([model(sequence[None]).logits[0] for sequence in tokens.split(lengths)])
