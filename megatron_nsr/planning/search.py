"""The best few layouts of the trainer for a number of GPUs. May import: config, models, planning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

from megatron_nsr.config import Config, ParallelConfig
from megatron_nsr.config_sections import Setting
from megatron_nsr.models.hf_config import ModelShape
from megatron_nsr.models.parallel import validate_layout
from megatron_nsr.planning.hardware import Gpu
from megatron_nsr.planning.layout import Layout, layout_of, layout_on, trainer_gpus
from megatron_nsr.planning.memory import ELEMENT_BYTES, MemoryPlan, plan_memory
from megatron_nsr.planning.plan import training_phases
from megatron_nsr.planning.recomputation import Recompute
from megatron_nsr.planning.step_time import Trainer
from megatron_nsr.planning.workload import Lengths, workload_of
from megatron_nsr.types import UserError

MOST_STAGES, MOST_CHUNKS = 64, 8


@dataclass(frozen=True, slots=True)
class Candidate:
    """seconds: of a step without sampling; that does not depend on the trainer's layout."""

    layout: Layout
    seconds: float
    memory: MemoryPlan


def best_layouts(config: Config, shape: ModelShape, gpus: int, gpu: Gpu, lengths: Lengths, *, count: int = 3) -> list[Candidate]:
    """Those that fit, the config's own among them, the fastest first and of equally fast ones the smallest."""
    workload, element = workload_of(config, lengths), ELEMENT_BYTES[config.model.dtype]
    training = trainer_gpus(config, gpus)
    found = []
    for layout in dict.fromkeys([layout_on(config, shape, gpus), *layouts(config, shape, training, gpu)]):
        memory = plan_memory(config, shape, layout, workload, gpu)
        if memory.problem is None:
            phases = training_phases(config, Trainer(shape, layout, workload, gpu, element), memory)
            found.append(Candidate(layout, sum(phase.seconds for phase in phases.values()), memory))
    return sorted(found, key=lambda candidate: (float(f"{candidate.seconds:.2e}"), candidate.memory.peak))[:count]


def overrides(config: Config, layout: Layout) -> list[str]:
    """The keys, with their values, by which a config of this layout differs: they can be given after its name."""
    given = config.parallel.model_dump() | {"recompute": config.training.recompute}
    chosen = {name: getattr(layout, name) for name in given}
    sections = {name: "training" if name == "recompute" else "parallel" for name in given}
    return [f"{sections[name]}.{name}={str(value).lower()}" for name, value in chosen.items() if value != given[name]]


def layouts(config: Config, shape: ModelShape, gpus: int, gpu: Gpu) -> Iterator[Layout]:
    """Every layout that the model allows: tensor sizes that divide a node, stages and chunks that divide the layers.

    Context parallelism stays the config's.
    """
    stages = [count for count in range(1, MOST_STAGES + 1) if shape.num_layers % count == 0]
    experts = [1] if shape.moe is None else [count for count in _powers(shape.moe.experts)]
    for tensor, pipeline, virtual, expert in product(_powers(gpu.per_node), stages, range(1, MOST_CHUNKS + 1), experts):
        if virtual > 1 and pipeline == 1:
            continue
        parallel = ParallelConfig.model_validate(
            config.parallel.model_dump()
            | {"tensor": tensor, "pipeline": pipeline, "virtual_pipeline": virtual, "expert": expert}
            | {"sequence": tensor > 1 and not config.model.transformer.get("distribute_saved_activations"), "distributed_optimizer": True}
        )
        try:
            validate_layout(parallel, shape, gpus)
            layout = layout_of(config.model_copy(update={"parallel": parallel}), shape, gpus)
        except UserError:
            continue
        sharded = layout.replicas > 1 or config.parallel.distributed_optimizer
        candidates = (replace(layout, recompute=recompute, distributed_optimizer=sharded) for recompute in recomputes(config))
        yield from (candidate for candidate in candidates if _possible(candidate, config.model.transformer))


def recomputes(config: Config) -> list[Recompute]:
    """All kinds that keep much less than another, and the config's; that alone where fields of model.transformer refine it."""
    own = config.training.recompute
    if any("recompute" in name or name == "distribute_saved_activations" for name in config.model.transformer):
        return [own]
    kinds: list[Recompute] = ["none", "full"]
    return [*kinds, own] if own == "selective" else kinds


def _possible(layout: Layout, fields: Mapping[str, Setting]) -> bool:
    """Whether megatron-core takes these fields of model.transformer with the layout."""
    if fields.get("distribute_saved_activations") and layout.sequence:
        return False
    if fields.get("cpu_offloading") and (layout.pipeline > 1 or layout.recompute != "none"):
        return False
    return not (fields.get("overlap_p2p_comm_warmup_flush") and layout.virtual_pipeline == 1)


def _powers(most: int) -> list[int]:
    return [1 << bit for bit in range(most.bit_length()) if 1 << bit <= most]
