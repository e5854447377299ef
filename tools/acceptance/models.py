"""Models of published shapes, and tiny ones for a dry run, as directories with config.json and the tokenizer of the task.

May import: tools.acceptance.task, the standard library.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tools.acceptance.task import EOS_ID, PAD_ID, tokenizer_bytes

_QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
}
# Of the config.json of Qwen2.5-0.5B, -1.5B and -7B.
SHAPES: dict[str, dict[str, Any]] = {
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "vocab_size": 152064,
    },
    # 32 is the smallest head that vLLM serves on a CPU; large first weights, so that the distributions are far from uniform.
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "vocab_size": 256,
        "initializer_range": 0.1,
    },
}


def write_model(folder: Path, name: str, **fields: Any) -> Path:
    """The directory, without weights. fields: in place of the shape's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_QWEN | SHAPES[name] | fields, indent=2) + "\n", encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS_ID, "pad_token_id": PAD_ID}), encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(tokenizer_bytes())
    return folder
