"""What would make a config fit that does not: keys, or more GPUs. Everything that is named was planned, and fits.

May import: config, models, planning, types.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from megatron_nsr.config import Config
from megatron_nsr.models.hf_config import ModelShape
from megatron_nsr.planning.hardware import Gpu
from megatron_nsr.planning.layout import Layout, layout_on, longest_tokens
from megatron_nsr.planning.memory import MemoryPlan, plan_memory
from megatron_nsr.planning.workload import Lengths, workload_of
from megatron_nsr.types import UserError

MOST_TIMES = 64  # the GPUs that were asked for


@dataclass(frozen=True, slots=True)
class Remedies:
    """keys: changes that do together, without one of which it would not fit. more_gpus: that are enough with more_gpus_keys.

    None: there are none. Where keys help, more_gpus are those on which the config fits as it is.
    """

    keys: tuple[str, ...] | None
    more_gpus: int | None
    more_gpus_keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """A config on its hardware."""

    config: Config
    shape: ModelShape
    gpus: int
    gpu: Gpu
    lengths: Lengths

    def layout(self) -> Layout:
        return layout_on(self.config, self.shape, self.gpus)

    def memory(self) -> MemoryPlan:
        return plan_memory(self.config, self.shape, self.layout(), workload_of(self.config, self.lengths), self.gpu)

    def with_keys(self, keys: Mapping[str, Any]) -> Asked | None:
        """None where the config would not be valid."""
        values = self.config.model_dump(by_alias=True)
        for key, value in keys.items():
            section, field = key.split(".")
            values[section][field] = value
        try:
            config = Config.model_validate(values)
        except ValidationError:
            return None
        return replace(self, config=config)


def find_remedies(asked: Asked) -> Remedies:
    """Of a config that does not fit."""
    keys = _keys(asked)
    for doubling in range(1, MOST_TIMES.bit_length()):
        more = replace(asked, gpus=asked.gpus << doubling)
        others = {} if _fits(more, {}) else _keys(more) if keys is None else None
        if others is not None:
            return Remedies(_written(keys), more.gpus, _written(others) or ())
    return Remedies(_written(keys), None, ())


def _keys(asked: Asked) -> dict[str, Any] | None:
    """What costs no time first, then the engine's memory, then the rest, until it fits; what was not needed is given up again."""
    taken: dict[str, Any] = {}
    for savers in _savers(asked):
        for key, value in savers.items():
            if not _fits(asked, taken) and _memory(asked, taken | {key: value}) is not None:
                taken |= {key: value}
        taken |= _resized(asked, taken)
    for key in list(taken):
        fewer = {name: value for name, value in taken.items() if name != key}
        if _fits(asked, fewer):
            taken = fewer
    return taken if _fits(asked, taken) else None


def _savers(asked: Asked) -> tuple[dict[str, Any], dict[str, Any]]:
    config, longest = asked.config, longest_tokens(asked.config, asked.shape)
    refined = any("recompute" in name for name in config.model.transformer)
    free = {"rollout.sleep_level": 2, "training.offload": "optimizer", "parallel.distributed_optimizer": True}
    if config.training.offload != "none":
        del free["training.offload"]
    costly = {
        "training.offload": "all",
        "training.tokens_per_micro_batch": min(config.training.tokens_per_micro_batch, longest),
        "training.recompute": config.training.recompute if refined else "full",
    }
    return free, costly


def _resized(asked: Asked, taken: Mapping[str, Any]) -> dict[str, Any]:
    """A share of memory for the engine, or GPUs to spread it over, with which all fits; empty where none does, or none is needed."""
    memory = _memory(asked, taken)
    if memory is None or memory.problem is None or memory.engine is None:
        return {}
    over = memory.peak - memory.capacity
    short = longest_tokens(asked.config, asked.shape) * memory.engine.cache_per_token - memory.engine.cache
    change = -over if over > 0 else max(0.0, short)
    rounded = math.ceil if change > 0 else math.floor
    if asked.config.rollout.kv_cache_mib is not None:
        changed: dict[str, Any] = {"rollout.kv_cache_mib": rounded((memory.engine.cache + change) / (1 << 20))}
    else:
        share = asked.config.rollout.gpu_memory_utilization + change / memory.capacity
        changed = {"rollout.gpu_memory_utilization": rounded(100 * share) / 100}
    spread = [{"rollout.tensor_parallel": size} for size in _engine_sizes(asked)]
    return next((keys for keys in [changed, *spread] if _fits(asked, {**taken, **keys})), {})


def _engine_sizes(asked: Asked) -> list[int]:
    """GPUs of an engine in the training processes, above what the config asks for."""
    least = asked.config.rollout.tensor_parallel
    sizes = (least << doubling for doubling in range(1, asked.gpu.per_node.bit_length()))
    alone = asked.config.rollout.mode == "server"  # there it would be the number of servers that changes
    return [] if alone else [n for n in sizes if n <= asked.gpu.per_node and asked.gpus % n == 0 and asked.shape.heads % n == 0]


def _memory(asked: Asked, keys: Mapping[str, Any]) -> MemoryPlan | None:
    changed = asked.with_keys(keys)
    try:
        return changed.memory() if changed is not None else None
    except UserError:
        return None


def _fits(asked: Asked, keys: Mapping[str, Any]) -> bool:
    memory = _memory(asked, keys)
    return memory is not None and memory.problem is None


def _written(keys: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """As they are given after a config's name."""
    if keys is None:
        return None
    return tuple(f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in keys.items())
