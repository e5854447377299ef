"""Seconds of each phase of a step, and what bounds it. Nothing overlaps: the trainer asks megatron-core for no overlap.

May import: config, models, planning. Formulas with their sources: docs/planning.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

from megatron_nsr.models.hf_config import ModelShape
from megatron_nsr.planning import communication
from megatron_nsr.planning.flops import LayerWork, head_products, layer_work, mean_context
from megatron_nsr.planning.hardware import (
    EXPERT_FP8_MATMUL_SHARE,
    EXPERT_MATMUL_SHARE,
    FP8_MATMUL_SHARE,
    HOST_SHARE,
    MATMUL_SHARE,
    MEMORY_SHARE,
    NETWORK_SHARE,
    Gpu,
    bandwidth,
)
from megatron_nsr.planning.layout import Layout
from megatron_nsr.planning.memory import model_state
from megatron_nsr.planning.parameters import Elements, model_elements, stage_elements
from megatron_nsr.planning.passes import Passes, step_passes
from megatron_nsr.planning.workload import Workload

RESOURCES = ("compute", "HBM", "NVLink", "network", "host", "idle")  # idle: the pipeline fills and drains


@dataclass(frozen=True, slots=True)
class Phase:
    """Seconds spent on each resource, one after another."""

    spent: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.spent.values())

    @property
    def bound(self) -> str:
        """The resource that takes most of it."""
        return max(self.spent, key=lambda name: self.spent[name]) if self.seconds else "-"

    def __add__(self, other: Phase) -> Phase:
        return Phase({name: self.spent.get(name, 0.0) + other.spent.get(name, 0.0) for name in {**self.spent, **other.spent}})

    def times(self, factor: float) -> Phase:
        return Phase({name: seconds * factor for name, seconds in self.spent.items()})


NOTHING = Phase({})


def layer_seconds(work: LayerWork, gpu: Gpu, fp8: float) -> float:
    """Of one token in one layer on one GPU. fp8: the share of the layers whose linear layers compute in FP8."""

    def seconds(products: float, share: float, fp8_share: float) -> float:
        return products * ((1 - fp8) / (share * gpu.flops) + (fp8 / (fp8_share * gpu.fp8_flops) if fp8 else 0.0))

    linear = seconds(work.linear, MATMUL_SHARE, FP8_MATMUL_SHARE)
    return linear + work.scores / (MATMUL_SHARE * gpu.flops) + seconds(work.experts, EXPERT_MATMUL_SHARE, EXPERT_FP8_MATMUL_SHARE)


@dataclass(frozen=True, slots=True)
class Trainer:
    """A trainer's layout, its GPUs and the work of a step."""

    shape: ModelShape
    layout: Layout
    workload: Workload
    gpu: Gpu
    element: int

    def phases(self) -> dict[str, Phase]:
        """By the names of the trainer's clock (time/*_s); grading is not planned."""
        found = {name: reduce(Phase.__add__, map(self.over, passes)) for name, passes in step_passes(self.workload).items()}
        if self.workload.reference:
            found["reference"] += self.exchange()
        return found

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases().values())

    def over(self, passes: Passes) -> Phase:
        """All runs of the schedule, with the optimizer's steps between them."""
        runs, count = passes.updates or 1, passes.per_schedule(self.workload, self.layout)
        seconds = self._pipelined(self.workload.kept_tokens / runs, count, passes)
        if passes.updates:
            elements = stage_elements(self.shape, self.layout, 0, critic=passes.critic)
            seconds = seconds + self._reduction(elements) + self._optimizer(elements)
        return seconds.times(runs)

    def exchange(self) -> Phase:
        """The reference's weights into the model and out again: both ways each time."""
        held = max(stage_elements(self.shape, self.layout, stage).total for stage in {0, self.layout.pipeline - 1}) * self.element
        return Phase({"host": 4 * held / (self.gpu.host_bandwidth * HOST_SHARE)})

    def push(self, *, servers: bool) -> Phase:
        """Gathers the weights, hands them over and copies them once more in the engine's layout."""
        inside, between = communication.push_gather_bytes(self.shape, self.layout, self.element)
        whole = model_elements(self.shape) * self.element
        stage_ranks = self.layout.gpus // self.layout.pipeline
        gather = self._on_wire(max(self.layout.tensor, self.layout.expert), inside)
        copies = Phase({"HBM": 4 * whole / (self.gpu.memory_bandwidth * MEMORY_SHARE)})
        broadcast = self._on_wire(self.layout.pipeline, between, stride=stage_ranks)
        sent = Phase({"network": whole / (self.gpu.network_bandwidth * NETWORK_SHARE)}) if servers else NOTHING
        return gather + broadcast + copies + sent

    def _pipelined(self, tokens: float, count: int, passes: Passes) -> Phase:
        """`tokens` of all ranks, in `count` micro-batches a rank: the slowest stage sets the pace, and the pipeline fills once."""
        mine = tokens / self.layout.data / self.layout.context
        stages = sorted({0, self.layout.pipeline - 1})
        each = [self._stage(mine / count, stage, passes) for stage in stages]
        slowest = max(each, key=lambda phase: phase.seconds)
        idle = (self.layout.pipeline - 1) / self.layout.virtual_pipeline * slowest.seconds
        return slowest.times(count) + Phase({"idle": idle})

    def _stage(self, tokens: float, stage: int, passes: Passes) -> Phase:
        """One micro-batch of `tokens` tokens a rank on one stage."""
        shape, layout = self.shape, self.layout
        work = layer_work(shape, layout, passes, mean_context(self.workload.lengths))
        seconds = shape.num_layers / layout.pipeline * layer_seconds(work, self.gpu, layout.fp8_share(shape))
        if stage == layout.pipeline - 1:
            seconds += passes.head * self.workload.response_share * head_products(shape) / MATMUL_SHARE / self.gpu.flops
        sent = communication.passes_bytes(shape, layout, passes, tokens, self.element)
        ring = self._on_wire(layout.context, sent["context parallel"], stride=layout.tensor)
        hidden = tokens * shape.num_layers / layout.pipeline * work.scores / (MATMUL_SHARE * self.gpu.flops) / layout.tensor
        found = [
            Phase({"compute": tokens * seconds / layout.tensor}),
            ring.times(max(0.0, 1 - hidden / ring.seconds)) if ring.seconds else NOTHING,  # keys and values travel while scores are formed
            self._on_wire(layout.tensor, sent["tensor parallel"]),
            self._on_wire(layout.expert, sent["expert parallel"]),
            self._on_wire(layout.pipeline, sent["pipeline"], stride=layout.gpus // layout.pipeline),
        ]
        return reduce(Phase.__add__, found)

    def _reduction(self, elements: Elements) -> Phase:
        """Gradients summed and new weights gathered over the ranks that hold the same parameters."""
        sent = communication.gradient_bytes(self.layout, elements) + communication.parameter_bytes(self.layout, elements, self.element)
        return self._on_wire(self.layout.replicas, sent, stride=self.layout.tensor)

    def _optimizer(self, elements: Elements) -> Phase:
        """Gradients are set to zero, their norm is taken, and Adam reads and writes its state."""
        state = model_state(elements, self.layout, self.element)
        moved = 2 * state.gradients + 2 * state.optimizer + state.weights
        return Phase({"HBM": moved / (self.gpu.memory_bandwidth * MEMORY_SHARE)})

    def _on_wire(self, ranks: int, sent: float, stride: int = 1) -> Phase:
        if ranks == 1 or not sent:
            return NOTHING
        name = "NVLink" if ranks * stride <= self.gpu.per_node else "network"
        return Phase({name: sent / bandwidth(self.gpu, ranks, stride)})
