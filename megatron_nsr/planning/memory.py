"""Memory of one GPU by part, at the moments when it is largest: while the policy updates, while weights are pushed, while vLLM samples.

May import: config, models, weights, planning. Formulas with their sources: docs/planning.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_nsr.config import Config
from megatron_nsr.models.hf_config import ModelShape
from megatron_nsr.planning.activations import activation_bytes, workspace_bytes
from megatron_nsr.planning.engine import EngineMemory, engine_memory
from megatron_nsr.planning.hardware import GIB, Gpu
from megatron_nsr.planning.layout import Layout, longest_tokens
from megatron_nsr.planning.parameters import Elements, fp8_elements, largest_tensor, model_elements, stage_elements
from megatron_nsr.planning.passes import update_passes
from megatron_nsr.planning.workload import Workload

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
BATCH_TOKEN_BYTES = 80  # of a packed token on the device: ids, targets, weights and log-probs of training/packing.py and HeadOutputs
MOMENTS = ("update", "push", "sampling")
Sizes = tuple[float, float, float]  # one a moment


@dataclass(frozen=True, slots=True)
class ModelState:
    """What a model in training holds from the first step on, bytes of one rank."""

    weights: float
    gradients: float
    optimizer: float


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """parts: bytes of each part at each of MOMENTS, on the GPU of the fullest pipeline stage. problem: None where it fits."""

    stage: int
    parts: Mapping[str, Sizes]
    capacity: float
    engine: EngineMemory | None  # beside the policy, or alone on a server's GPUs; None: nothing is sampled
    host: float  # bytes of one rank in host memory
    problem: str | None

    def total(self, moment: int) -> float:
        return sum(part[moment] for part in self.parts.values())

    @property
    def peak(self) -> float:
        return max(map(self.total, range(len(MOMENTS))))


def model_state(elements: Elements, layout: Layout, element: int) -> ModelState:
    """Gradients are summed in fp32. Adam has two fp32 moments, and for bf16 weights an fp32 copy of them.

    A distributed optimizer cuts its state over the ranks that hold the same parameters; weights and gradients stay whole.
    """
    state = 8 if element == 4 else 12
    sharded = layout.distributed_optimizer
    dense = elements.dense / (layout.replicas if sharded else 1)
    experts = elements.experts / (layout.expert_replicas if sharded else 1)
    return ModelState(element * elements.total, 4 * elements.total, state * (dense + experts))


def plan_memory(config: Config, shape: ModelShape, layout: Layout, workload: Workload, gpu: Gpu) -> MemoryPlan:
    """Of the pipeline stage that needs most: the first keeps most micro-batches, the last has the head."""
    samples = config.objective.name != "supervised" or any(config.evaluation.benchmarks.values())
    engine = engine_memory(config, shape, gpu, ELEMENT_BYTES[config.model.dtype]) if samples else None
    stages = sorted({0, layout.pipeline - 1})
    plans = [plan_stage(config, shape, layout, workload, gpu, engine, stage) for stage in stages]
    return max(plans, key=lambda plan: plan.peak)


def plan_stage(
    config: Config, shape: ModelShape, layout: Layout, workload: Workload, gpu: Gpu, engine: EngineMemory | None, stage: int
) -> MemoryPlan:
    element = ELEMENT_BYTES[config.model.dtype]
    elements = stage_elements(shape, layout, stage)
    parts = _states("", model_state(elements, layout, element), config.training.offload)
    if workload.critic:
        parts |= _states(
            "critic ", model_state(stage_elements(shape, layout, stage, critic=True), layout, element), config.training.offload
        )
    if layout.fp8:  # each weight rounded, and its transpose, from the first micro-batch until they are freed with the gradients
        copies, stay = (1 + workload.critic) * 2 * fp8_elements(shape, layout), float(config.training.offload == "none")
        parts["weights in FP8"] = (copies, stay * copies, stay * copies)
    counted = update_passes(workload).per_schedule(workload, layout)
    chunk = config.training.head_chunk_tokens
    sign_norms = config.logging.sign_norms_every > 0 and config.objective.entropy_coefficient > 0 and config.objective.name != "supervised"
    work = workspace_bytes(shape, layout, stage, element, gpu.backend, chunk=chunk, sign_norms=sign_norms)
    kept = activation_bytes(shape, layout, counted, stage, element, gpu.backend)
    if gpu.backend == "cpu" and layout.distributed_optimizer and layout.replicas > 1:
        work = max(work, parts["gradients"][0] - kept)  # gloo's reduce-scatter copies its input, once the activations are gone
    parts["activations"] = (kept, 0.0, 0.0)
    parts["head and backward workspace"] = (work, 0.0, 0.0)
    batch = BATCH_TOKEN_BYTES * workload.kept_tokens / layout.data
    parts["packed batch"] = (batch, batch, 0.0)
    if engine is not None and config.rollout.mode == "colocated":
        parts |= _engine_parts(engine, asleep=config.rollout.sleep_level > 0)
    parts["push buckets"] = (0.0, push_bytes(config, shape, layout, element), 0.0)
    parts["CUDA, NCCL, allocator" if gpu.backend == "te" else "the process itself"] = (gpu.reserved_bytes,) * 3
    plan = MemoryPlan(stage, parts, gpu.memory_bytes, engine, _host_bytes(config, workload, parts), None)
    return replace(plan, problem=_problem(plan, config, shape, layout))


def push_bytes(config: Config, shape: ModelShape, layout: Layout, element: int) -> float:
    """Two buckets of gathered weights and the largest tensor, joined (weights/push_plan.py); no buckets where each rank has the model."""
    joined = largest_tensor(shape) * element
    if layout.tensor * layout.pipeline * layout.expert == 1:
        return float(joined)
    whole = model_elements(shape) * element
    bucket = max(config.rollout.push_bucket_mib << 20, joined)
    return float(min(2 * bucket, whole) + joined)


def _states(prefix: str, state: ModelState, level: str) -> dict[str, Sizes]:
    """level: what leaves the device while the engine samples. At the push the weights are back."""
    trained, weights = float(level == "none"), float(level != "all")
    return {
        f"{prefix}weights": (state.weights, state.weights, weights * state.weights),
        f"{prefix}gradients": (state.gradients, trained * state.gradients, trained * state.gradients),
        f"{prefix}optimizer": (state.optimizer, trained * state.optimizer, trained * state.optimizer),
    }


def _engine_parts(engine: EngineMemory, *, asleep: bool) -> dict[str, Sizes]:
    """asleep: while the policy trains. The weights wake for the push, the cache when sampling begins."""
    awake = float(not asleep)
    cache = max(0.0, engine.cache)
    return {
        "engine weights": (awake * engine.weights, engine.weights, engine.weights),
        "engine KV cache": (awake * cache, awake * cache, cache),
        "engine workspace": (awake * engine.workspace, awake * engine.workspace, engine.workspace),
    }


def _host_bytes(config: Config, workload: Workload, parts: Mapping[str, Sizes]) -> float:
    """The reference's weights, and what is offloaded."""
    reference = parts["weights"][0] if workload.reference or config.logging.kl_to_base_every else 0.0
    return reference + moved_bytes(config, parts)


def moved_bytes(config: Config, parts: Mapping[str, Sizes]) -> float:
    """What goes to the host and comes back in a step, counted once. Gradient buffers are freed; at sleep level 2 so is the engine."""
    engine = parts.get("engine weights", (0.0, 0.0, 0.0))[2] if config.rollout.sleep_level == 1 else 0.0
    trained = [sizes for name, sizes in parts.items() if name.endswith(("weights", "optimizer")) and not name.startswith("engine")]
    return engine + sum(sizes[0] - sizes[2] for sizes in trained)


def _problem(plan: MemoryPlan, config: Config, shape: ModelShape, layout: Layout) -> str | None:
    over = plan.peak - plan.capacity
    if over > 0:
        moment = max(range(len(MOMENTS)), key=plan.total)
        largest = sorted(plan.parts.items(), key=lambda item: -item[1][moment])[:3]
        reasons = ", ".join(f"{name} {sizes[moment] / GIB:.1f}" for name, sizes in largest)
        where = ("sampling" if MOMENTS[moment] == "sampling" else f"the {MOMENTS[moment]}") + (
            f" on pipeline stage {plan.stage}" if layout.pipeline > 1 else ""
        )
        return f"does not fit: {over / GIB:.1f} GiB over {plan.capacity / GIB:.0f} GiB at {where}, because of {reasons} GiB"
    engine, longest = plan.engine, longest_tokens(config, shape)
    if engine is not None and engine.cached_tokens < longest:
        short = (longest * engine.cache_per_token - engine.cache) / GIB
        where = "rollout.gpu_memory_utilization" if config.rollout.kv_cache_mib is None else "rollout.kv_cache_mib"
        whose = "the KV cache of a server's GPU" if config.rollout.mode == "server" else "the KV cache"
        return (
            f"does not fit: {short:.1f} GiB over what {where} leaves {whose}, because one sequence of {longest} tokens takes "
            f"{longest * engine.cache_per_token / GIB:.1f} GiB beside the engine's weights, {engine.weights / GIB:.1f} GiB"
        )
    return None
