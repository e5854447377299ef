"""How the trainer's model lies over GPUs: what of a config, and of a search beside it, planning needs.

May import: config, models, types, planning.recomputation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_nsr.config import Config
from megatron_nsr.models.fp8 import Fp8, check_fp8
from megatron_nsr.models.hf_config import ModelShape
from megatron_nsr.models.parallel import validate_layout
from megatron_nsr.planning.recomputation import UNREFINED, Again, Recompute, Refinement, refinement_of
from megatron_nsr.types import UserError


@dataclass(frozen=True, slots=True)
class Layout:
    """gpus: of the trainer. micro_batch_tokens: of a micro-batch, over all context-parallel ranks. longest: of a sequence, if known."""

    gpus: int
    micro_batch_tokens: int
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    expert: int = 1
    sequence: bool = False
    distributed_optimizer: bool = False
    recompute: Recompute = "none"
    refined: Refinement = UNREFINED
    longest: int | None = None
    fp8: str | None = None
    fp8_edge_layers: int = 0

    @property
    def data(self) -> int:
        """Data-parallel ranks: groups of GPUs that work on different samples."""
        return self.gpus // (self.tensor * self.pipeline * self.context)

    @property
    def replicas(self) -> int:
        """Ranks that hold the same parameters and sum their gradients; a distributed optimizer cuts its state over them."""
        return self.data * self.context

    @property
    def expert_replicas(self) -> int:
        """The same of an expert: experts are whole on their rank, so tensor-parallel ranks hold different ones, or copies."""
        return self.gpus // (self.pipeline * self.expert)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch that a rank's attention and MLP see."""
        return -(-self.micro_batch_tokens // self.context)

    @property
    def part_tokens(self) -> int:
        """Tokens outside attention and MLP, which sequence parallelism spreads over the tensor-parallel ranks."""
        return -(-self.tokens // self.tensor) if self.sequence else self.tokens

    @property
    def longest_tokens(self) -> int:
        return min(self.longest or self.micro_batch_tokens, self.micro_batch_tokens)

    def recomputed_share(self, shape: ModelShape) -> float:
        """Of the layers those that `full` recomputes."""
        if self.recompute != "full" or self.refined.block is None:
            return float(self.recompute == "full")
        return min(1.0, self.refined.block * self.pipeline * self.virtual_pipeline / shape.num_layers)

    def fp8_share(self, shape: ModelShape) -> float:
        """Of the first stage's layers, and of the last one's, those that compute in FP8."""
        edges = self.fp8_edge_layers * (2 if self.pipeline == 1 else 1)
        return 1 - edges * self.pipeline / shape.num_layers if self.fp8 else 0.0

    def recomputes(self, module: str) -> bool:
        return self.recompute == "selective" and module in self.refined.modules

    def again(self, shape: ModelShape) -> Again:
        """What a layer computes once more, on average over the layers."""
        if self.recompute == "full":
            return Again(*3 * (self.recomputed_share(shape),))
        return Again(scores=float(self.recomputes("core_attn")), mlp=float(self.recomputes("moe" if shape.moe else "mlp")))

    def describe(self) -> str:
        """As the keys of a config."""
        sizes = [("tensor", self.tensor), ("pipeline", self.pipeline), ("virtual_pipeline", self.virtual_pipeline)]
        sizes += [("context", self.context), ("expert", self.expert)]
        keys = [f"parallel.{name}={size}" for name, size in sizes if size > 1]
        keys += ["parallel.sequence=true"] if self.sequence else []
        keys += ["parallel.distributed_optimizer=true"] if self.distributed_optimizer else []
        keys += [f"model.fp8={self.fp8}"] if self.fp8 else []
        return " ".join([*keys, f"training.recompute={self.recompute}"])


def layout_of(config: Config, shape: ModelShape, gpus: int) -> Layout:
    """The config's layout on `gpus` GPUs of the trainer. Raises UserError naming the first field that does not fit."""
    parallel = config.parallel
    validate_layout(parallel, shape, gpus)
    if fp8 := Fp8.of(config.model):
        check_fp8(fp8, shape, parallel, "te")
    layout = Layout(
        gpus=gpus,
        micro_batch_tokens=0,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        context=parallel.context,
        expert=parallel.expert,
        sequence=parallel.sequence,
        distributed_optimizer=parallel.distributed_optimizer,
        recompute=config.training.recompute,
        refined=refinement_of(config),
        longest=longest_tokens(config, shape),
        fp8=config.model.fp8,
        fp8_edge_layers=config.model.fp8_edge_layers,
    )
    return replace(layout, micro_batch_tokens=most_tokens(config, shape, layout.data))


def most_tokens(config: Config, shape: ModelShape, data: int) -> int:
    """Of a micro-batch: the packing budget, or all that a rank may get of a mini-batch if that is less; at least the longest sequence."""
    if config.objective.name == "supervised":
        sequences = config.data.prompts_per_step
    else:
        sequences = (config.critic.mini_batch_prompts or config.objective.mini_batch_prompts) * config.rollout.samples_per_prompt
    longest = longest_tokens(config, shape)
    return max(longest, min(config.training.tokens_per_micro_batch, -(-sequences // data) * longest))


def longest_tokens(config: Config, shape: ModelShape) -> int:
    """Input tokens of the longest sequence that is trained on: it travels alone where it exceeds the packing budget."""
    return min(config.data.max_prompt_tokens + config.rollout.max_response_tokens, shape.max_positions) - 1


def trainer_gpus(config: Config, gpus: int) -> int:
    """Of all GPUs those that train: servers have their own. Raises UserError where servers leave none."""
    if config.rollout.mode == "colocated":
        return gpus
    serving = len(config.rollout.servers) * config.rollout.tensor_parallel
    if serving >= gpus:
        raise UserError(f"--gpus {gpus}: rollout.servers and rollout.tensor_parallel take {serving} of them, and the trainer needs some")
    return gpus - serving


def layout_on(config: Config, shape: ModelShape, gpus: int) -> Layout:
    """The config's layout on what servers leave of `gpus` GPUs. Raises UserError; of a wrong number with the nearest ones that do."""
    training, parallel = trainer_gpus(config, gpus), config.parallel
    copy = parallel.tensor * parallel.context * parallel.pipeline
    if over := training % copy:
        who = f"the servers take {gpus - training}, the trainer {training}" if gpus > training else "all of them train"
        near = [str(number) for number in (gpus - over, gpus - over + copy) if number > gpus - training]
        sizes = f"parallel.tensor={parallel.tensor} x parallel.context={parallel.context} x parallel.pipeline={parallel.pipeline}"
        raise UserError(f"--gpus {gpus}: {who}, and {sizes} needs a multiple of {copy}; give {' or '.join(near)}")
    return layout_of(config, shape, training)
