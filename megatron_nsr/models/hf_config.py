"""Reads the shape of a model from a Hugging Face directory's config.json: Qwen2/2.5, Qwen3, Llama 3 and Qwen3's mixture of experts.

May import: platform.model_files, types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from megatron_nsr.platform.model_files import read_json
from megatron_nsr.types import UserError

Family = Literal["qwen2", "qwen3", "llama", "qwen3_moe"]
FAMILIES: tuple[Family, ...] = ("qwen2", "qwen3", "llama", "qwen3_moe")


@dataclass(frozen=True, slots=True)
class Llama3Rope:
    """Llama 3.1's stretched rotary frequencies (rope_type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """What stands in place of every layer's MLP: a router, and experts of which each token uses a few."""

    experts: int
    experts_per_token: int
    ffn: int  # of one expert
    normalize: bool  # a token's weights of its experts sum to one, instead of being their share of the softmax over all experts


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Everything about an architecture that building, mapping and planning need. Sizes are whole-model sizes."""

    family: Family
    num_layers: int
    hidden: int
    ffn: int  # of a dense layer's MLP; not in use where there are experts
    heads: int
    query_groups: int
    head_dim: int
    vocab_size: int  # rows of the embedding on disk, never padded
    tie_embeddings: bool
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Rope | None
    qkv_bias: bool
    qk_norm: bool
    max_positions: int
    initializer_range: float
    moe: MixtureOfExperts | None = None


def read_model_shape(path: str) -> ModelShape:
    """Reads PATH/config.json.

    Raises UserError naming model.path and what is missing or not supported.
    """
    reader = _Reader(path, _config_values(path))
    family = reader.family()
    reader.refuse_unsupported(family)
    theta, scaling = reader.rope()
    heads = reader.integer("num_attention_heads")
    hidden = reader.integer("hidden_size")
    groups = reader.integer("num_key_value_heads", default=heads if family == "llama" else None)
    if heads % groups:
        raise reader.error(f"num_key_value_heads={groups} does not divide num_attention_heads={heads}")
    head_dim = reader.values.get("head_dim") or (128 if family.startswith("qwen3") else hidden // heads)
    return ModelShape(
        family=family,
        num_layers=reader.integer("num_hidden_layers"),
        hidden=hidden,
        ffn=reader.integer("intermediate_size"),
        heads=heads,
        query_groups=groups,
        head_dim=int(head_dim),
        vocab_size=reader.integer("vocab_size"),
        tie_embeddings=bool(reader.values.get("tie_word_embeddings", False)),
        norm_eps=float(reader.values.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=family == "qwen2",
        qk_norm=family.startswith("qwen3"),
        max_positions=reader.integer("max_position_embeddings"),
        initializer_range=float(reader.values.get("initializer_range", 0.02)),
        moe=reader.mixture_of_experts() if family == "qwen3_moe" else None,
    )


def _config_values(path: str) -> dict[str, Any]:
    values = read_json(path, "config.json")
    if values is None:
        missing = "no config.json in it" if Path(path).is_dir() else "no such directory"
        raise UserError(f"model.path={path}: {missing}; give a Hugging Face model's directory")
    return values


class _Reader:
    """config.json's values with errors that say where they stand."""

    def __init__(self, path: str, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values

    def error(self, problem: str) -> UserError:
        return UserError(f"model.path={self.path}: config.json: {problem}")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.values.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(f"{name}={value!r}: a positive integer is needed")
        return value

    def family(self) -> Family:
        family = self.values.get("model_type")
        if family not in FAMILIES:
            raise self.error(f"model_type={family!r} is not supported; supported are {', '.join(FAMILIES)}")
        return cast(Family, family)

    def refuse_unsupported(self, family: Family) -> None:
        """Raises for whatever would load but compute something else than the model."""
        values = self.values
        if values.get("hidden_act", "silu") != "silu":
            raise self.error(f"hidden_act={values['hidden_act']!r} is not supported, only silu")
        if "quantization_config" in values:
            raise self.error("quantization_config: quantized weights are not supported")
        for name in ("attention_bias", "mlp_bias"):
            if values.get(name) and family != "qwen2":
                raise self.error(f"{name}=true is not supported for {family}")
        if self._sliding_window():
            raise self.error("sliding window attention is in use, which is not supported (use_sliding_window must be false)")

    def _sliding_window(self) -> bool:
        kinds = self.values.get("layer_types")
        if kinds is not None:
            return any(kind != "full_attention" for kind in kinds)
        if not self.values.get("use_sliding_window") or self.values.get("sliding_window") is None:
            return False
        return int(self.values.get("max_window_layers", 28)) < self.integer("num_hidden_layers")

    def mixture_of_experts(self) -> MixtureOfExperts:
        if self.values.get("decoder_sparse_step", 1) != 1 or self.values.get("mlp_only_layers"):
            found = ", ".join(f"{name}={self.values.get(name)!r}" for name in ("decoder_sparse_step", "mlp_only_layers"))
            raise self.error(f"{found}: layers without experts are not supported (decoder_sparse_step must be 1, mlp_only_layers empty)")
        # transformers 5 writes num_local_experts
        experts = self.integer("num_local_experts" if "num_local_experts" in self.values else "num_experts")
        chosen = self.integer("num_experts_per_tok")
        if chosen > experts:
            raise self.error(f"num_experts_per_tok={chosen} exceeds num_experts={experts}")
        normalize = bool(self.values.get("norm_topk_prob", False))
        if normalize and chosen == 1:  # every weight would be 1, and the router without a gradient
            raise self.error("norm_topk_prob=true with num_experts_per_tok=1 is not supported")
        return MixtureOfExperts(experts, chosen, self.integer("moe_intermediate_size"), normalize)

    def rope(self) -> tuple[float, Llama3Rope | None]:
        """(theta, scaling) of either spelling: rope_theta with rope_scaling, or rope_parameters (transformers 5)."""
        parameters = dict(self.values.get("rope_parameters") or self.values.get("rope_scaling") or {})
        theta = float(parameters.get("rope_theta") or self.values.get("rope_theta") or 10000.0)
        kind = parameters.get("rope_type") or parameters.get("type") or "default"
        if parameters.get("partial_rotary_factor", self.values.get("partial_rotary_factor", 1.0)) != 1.0:
            raise self.error("partial_rotary_factor other than 1 is not supported")
        if kind == "default":
            return theta, None
        if kind != "llama3":
            raise self.error(f"rope_type={kind!r} is not supported, only default and llama3")
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        missing = [name for name in names if name not in parameters]
        if missing:
            raise self.error(f"rope_type='llama3' needs {', '.join(missing)}")
        factor, low, high, original = (parameters[name] for name in names)
        return theta, Llama3Rope(float(factor), float(low), float(high), int(original))
