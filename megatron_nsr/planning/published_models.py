"""Shapes of published models, so that a run can be planned before its model is downloaded: the values of each config.json on the hub.

May import: models.hf_config, types.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_nsr.models.hf_config import Family, Llama3Rope, MixtureOfExperts, ModelShape, read_model_shape
from megatron_nsr.types import UserError

_LLAMA3 = Llama3Rope(8.0, 1.0, 4.0, 8192)


def _shape(family: Family, layers: int, hidden: int, ffn: int, heads: int, groups: int, vocab: int, positions: int) -> ModelShape:
    theta = {"qwen2": 1e6, "qwen3": 1e6, "qwen3_moe": 1e6, "llama": 5e5}[family]
    return ModelShape(
        family=family,
        num_layers=layers,
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        query_groups=groups,
        head_dim=128,
        vocab_size=vocab,
        tie_embeddings=False,
        norm_eps=1e-5 if family == "llama" else 1e-6,
        rope_theta=theta,
        rope_scaling=_LLAMA3 if family == "llama" else None,
        qkv_bias=family == "qwen2",
        qk_norm=family.startswith("qwen3"),
        max_positions=positions,
        initializer_range=0.02,
    )


_QWEN25_7B = _shape("qwen2", 28, 3584, 18944, 28, 4, 152064, 32768)
_QWEN3_30B = _shape("qwen3_moe", 48, 2048, 6144, 32, 4, 151936, 40960)
_QWEN3_235B = _shape("qwen3_moe", 94, 4096, 12288, 64, 4, 151936, 40960)

PUBLISHED: dict[str, ModelShape] = {
    "Qwen2.5-7B": replace(_QWEN25_7B, max_positions=131072),
    "Qwen2.5-7B-Instruct": _QWEN25_7B,
    "Qwen2.5-Math-7B": replace(_QWEN25_7B, max_positions=4096, rope_theta=1e4),
    "Qwen2.5-32B": _shape("qwen2", 64, 5120, 27648, 40, 8, 152064, 131072),
    "Qwen2.5-32B-Instruct": _shape("qwen2", 64, 5120, 27648, 40, 8, 152064, 32768),
    "Qwen2.5-72B": _shape("qwen2", 80, 8192, 29568, 64, 8, 152064, 131072),
    "Qwen2.5-72B-Instruct": _shape("qwen2", 80, 8192, 29568, 64, 8, 152064, 32768),
    "Qwen3-4B": replace(_shape("qwen3", 36, 2560, 9728, 32, 8, 151936, 40960), tie_embeddings=True),
    "Qwen3-32B": _shape("qwen3", 64, 5120, 25600, 64, 8, 151936, 40960),
    "Qwen3-30B-A3B": replace(_QWEN3_30B, moe=MixtureOfExperts(128, 8, 768, True)),
    "Qwen3-235B-A22B": replace(_QWEN3_235B, moe=MixtureOfExperts(128, 8, 1536, True)),
    "Llama-3.1-8B": _shape("llama", 32, 4096, 14336, 32, 8, 128256, 131072),
    "Llama-3.1-8B-Instruct": _shape("llama", 32, 4096, 14336, 32, 8, 128256, 131072),
    "Llama-3.1-70B-Instruct": _shape("llama", 80, 8192, 28672, 64, 8, 128256, 131072),
    "Llama-3.1-405B": _shape("llama", 126, 16384, 53248, 128, 8, 128256, 131072),
    "Llama-3.1-405B-Instruct": _shape("llama", 126, 16384, 53248, 128, 8, 128256, 131072),
}


def model_shape(path: str) -> ModelShape:
    """PATH/config.json's shape, or that of the published model whose name is the directory's, where there is no such file.

    Raises UserError naming model.path where neither is there.
    """
    name = Path(path).name
    if not (Path(path) / "config.json").is_file() and name in PUBLISHED:
        return PUBLISHED[name]
    try:
        return read_model_shape(path)
    except UserError as error:
        if (Path(path) / "config.json").is_file():
            raise
        raise UserError(f"{error}; without one, `plan` knows {', '.join(PUBLISHED)} by the directory's name") from None
