"""The plan of a config on N GPUs: memory, time of each phase and what bounds it, bytes by group, floating-point operations.

May import: config, models, planning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_nsr.config import Config
from megatron_nsr.models.hf_config import ModelShape
from megatron_nsr.planning.communication import step_bytes
from megatron_nsr.planning.engine import engine_memory
from megatron_nsr.planning.flops import model_flops, step_flops
from megatron_nsr.planning.generation import Engine, Generation, generate_on
from megatron_nsr.planning.hardware import HOST_SHARE, Gpu
from megatron_nsr.planning.layout import Layout, layout_on, trainer_gpus
from megatron_nsr.planning.memory import ELEMENT_BYTES, MemoryPlan, moved_bytes, plan_memory
from megatron_nsr.planning.step_time import Phase, Trainer
from megatron_nsr.planning.workload import Lengths, Workload, workload_of
from megatron_nsr.types import UserError


@dataclass(frozen=True, slots=True)
class Plan:
    """phases: of one step, in their order. communication: bytes that one GPU sends in a step, by group. flops: of a step, by phase."""

    config: Config
    shape: ModelShape
    gpu: Gpu
    gpus: int
    layout: Layout
    workload: Workload
    memory: MemoryPlan
    phases: Mapping[str, Phase]
    communication: Mapping[str, float]
    flops: Mapping[str, float]

    @property
    def fits(self) -> bool:
        return self.memory.problem is None

    @property
    def step_seconds(self) -> float:
        """One step ahead, sampling hides behind training or the other way round."""
        seconds = {name: phase.seconds for name, phase in self.phases.items()}
        if not self.config.rollout.max_staleness:
            return sum(seconds.values())
        rollout, push = seconds["rollout"], seconds["push"]
        return max(rollout, sum(seconds.values()) - rollout - push) + push

    @property
    def utilization(self) -> float:
        """Of the trainer's peak by the update, without what is recomputed."""
        update = self.phases["update"].seconds
        return model_flops(self.shape, self.workload, self.workload.kept_tokens) / (update * self.layout.gpus * self.gpu.flops)


def make_plan(config: Config, shape: ModelShape, gpus: int, gpu: Gpu, lengths: Lengths, *, layout: Layout | None = None) -> Plan:
    """Raises UserError where the config's layout is none of this many GPUs. layout: in place of the config's."""
    _check_precision(config, gpu)
    layout = layout or layout_on(config, shape, gpus)
    workload, element = workload_of(config, lengths), ELEMENT_BYTES[config.model.dtype]
    trainer = Trainer(shape, layout, workload, gpu, element)
    phases: dict[str, Phase] = {}
    if config.objective.name != "supervised":
        phases["rollout"] = rollout_phase(config, shape, gpus, gpu, workload)
    memory = plan_memory(config, shape, layout, workload, gpu)
    phases |= training_phases(config, trainer, memory)
    return Plan(
        config,
        shape,
        gpu,
        gpus,
        layout,
        workload,
        memory,
        phases,
        step_bytes(shape, layout, workload, element),
        step_flops(shape, layout, workload),
    )


def _check_precision(config: Config, gpu: Gpu) -> None:
    given = {"model.fp8": config.model.fp8, "rollout.quantization": config.rollout.quantization}
    for key, value in given.items():
        if value is not None and not gpu.fp8_flops:
            raise UserError(f"{key}={value}: --gpu {gpu.name} has no FP8; leave it out, or plan for another GPU")


def training_phases(config: Config, trainer: Trainer, memory: MemoryPlan) -> dict[str, Phase]:
    """All of a step but sampling, in their order: what a plan, the search of layouts and simulated steps count."""
    phases = trainer.phases()
    if moved := moved_bytes(config, memory.parts):
        phases["offload"] = Phase({"host": 2 * moved / (trainer.gpu.host_bandwidth * HOST_SHARE)})
    if config.objective.name != "supervised":
        phases["push"] = trainer.push(servers=config.rollout.mode == "server")
    return phases


def engine_of(config: Config, shape: ModelShape, gpu: Gpu, lengths: Lengths) -> Engine:
    """One of the run's engines, with the sequences that its cache and max_num_seqs have room for; at least one."""
    element = ELEMENT_BYTES[config.model.dtype]
    memory = engine_memory(config, shape, gpu, element)
    room = min(config.rollout.max_num_seqs, int(memory.cached_tokens / lengths.sequence_mean))
    fp8 = config.rollout.quantization == "fp8"
    return Engine(shape, gpu, config.rollout.tensor_parallel, element, max(1, room), memory.cache_per_token, fp8)


def rollout_phase(config: Config, shape: ModelShape, gpus: int, gpu: Gpu, workload: Workload) -> Phase:
    """Until the slowest engine is done, on drawn lengths; a step's first draw, the same in every plan."""
    serving = gpus if config.rollout.mode == "colocated" else gpus - trainer_gpus(config, gpus)
    if serving % config.rollout.tensor_parallel:
        raise UserError(f"rollout.tensor_parallel={config.rollout.tensor_parallel} does not divide the {serving} GPUs that sample")
    if shape.heads % config.rollout.tensor_parallel:
        raise UserError(f"rollout.tensor_parallel={config.rollout.tensor_parallel} does not divide num_attention_heads={shape.heads}")
    engine = engine_of(config, shape, gpu, workload.lengths)
    engines = serving // engine.tensor
    done = generate_on(engine, engines, workload.prompts, workload.samples, workload.lengths, (config.run.seed, 1))
    return generation_phase(max(done, key=lambda one: one.seconds))


def generation_phase(done: Generation) -> Phase:
    return Phase({"compute": done.prefill + done.decode - done.memory_bound, "HBM": done.memory_bound})
