"""What a backward pass computes once more: training.recompute, and the fields of model.transformer that refine it.

May import: config. The fields' meaning: megatron-core 0.16.1, transformer/transformer_block.py and transformer_layer.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_nsr.config import Config

Recompute = Literal["none", "selective", "full"]
PLANNED_FIELDS = ("recompute_method", "recompute_num_layers", "recompute_modules", "distribute_saved_activations")
PLANNED_MODULES = ("core_attn", "mlp", "moe")


@dataclass(frozen=True, slots=True)
class Refinement:
    """modules: that `selective` recomputes. together: layers that `full` recomputes from one kept input. block: how many of each chunk's
    layers `full` recomputes, None for all. distributed: kept inputs are cut over the tensor-parallel ranks.
    """

    modules: frozenset[str] = frozenset({"core_attn"})
    together: int = 1
    block: int | None = None
    distributed: bool = False


UNREFINED = Refinement()


@dataclass(frozen=True, slots=True)
class Again:
    """Shares of a layer's forward pass: attention's linear layers, its scores, and the MLP or the experts."""

    linear: float = 0.0
    scores: float = 0.0
    mlp: float = 0.0


def refinement_of(config: Config) -> Refinement:
    fields = config.model.transformer
    layers = fields.get("recompute_num_layers", 1)
    count = layers if isinstance(layers, int) else 1
    modules = fields.get("recompute_modules", ["core_attn"])
    by_block = fields.get("recompute_method") == "block"
    return Refinement(
        modules=frozenset(modules if isinstance(modules, list) else [str(modules)]),
        together=1 if by_block else count,
        block=count if by_block else None,
        distributed=fields.get("distribute_saved_activations") is True,
    )


def unplanned(config: Config) -> list[str]:
    """What the config sets and a plan leaves out, as `field=value`: it may take more or less memory or time than is said."""
    found = []
    for name, value in config.model.transformer.items():
        known = name in PLANNED_FIELDS and (name != "recompute_modules" or set(refinement_of(config).modules) <= set(PLANNED_MODULES))
        found += [] if known else [f"model.transformer.{name}={value}"]
    now_and_then = {
        "model.head_fp8": config.model.head_fp8,
        "objective.sampling_rounds": config.objective.sampling_rounds if config.objective.sampling_rounds > 1 else 0,
        "logging.probe_every": config.logging.probe_every,
        "logging.kl_to_base_every": config.logging.kl_to_base_every,
    }
    return found + [f"{name}={value}" for name, value in now_and_then.items() if value]
