"""From a configuration to an actor: process groups, model, weights, optimizer. May import: config, models, weights, losses, training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_nsr.config import Config, ObjectiveConfig
from megatron_nsr.losses.policy_head import HeadOptions, HeadOutputs, policy_head
from megatron_nsr.losses.shard import VocabularyShard
from megatron_nsr.losses.terms import LossTerms
from megatron_nsr.losses.value_head import ValueInputs, ValueOutputs, value_head
from megatron_nsr.models.backends import Backend
from megatron_nsr.models.critic import CriticModel, copy_trunk
from megatron_nsr.models.fp8 import Fp8
from megatron_nsr.models.hf_config import ModelShape
from megatron_nsr.models.parallel import initialize_parallel
from megatron_nsr.models.policy import Head, PolicyModel, build_policy, transformer_config
from megatron_nsr.models.te_backend import require_fp8
from megatron_nsr.objectives.objective import OwnLoss
from megatron_nsr.platform import distributed
from megatron_nsr.training.actor import Actor, Diagnostics, HeadWork
from megatron_nsr.training.checkpoint_files import is_checkpoint, read_description
from megatron_nsr.training.checkpoints import load_state
from megatron_nsr.training.critic import Critic
from megatron_nsr.training.optimizer import build_optimizer, wrap_data_parallel
from megatron_nsr.training.parallel_groups import ParallelGroups
from megatron_nsr.training.reference import ReferenceWeights
from megatron_nsr.weights.loading import load_hf_weights, random_hf_tensors
from megatron_nsr.weights.safetensors_files import SafetensorsDirectory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_actor(config: Config, shape: ModelShape, backend: Backend, *, own_loss: OwnLoss | None = None, training: bool = True) -> Actor:
    """Builds the policy on this rank, with the weights that `model.path` and `model.initialization` name.

    own_loss: an objective that brings its own loss. Without `training` it has neither gradient buffers nor an optimizer, and only measures.
    """
    initialize_parallel(config.parallel, shape, distributed.world_size(), config.run.seed)
    groups = ParallelGroups.current(backend.device)
    dtype = DTYPES[config.model.dtype]
    chunks = build_policy(
        shape,
        config.parallel,
        dtype=dtype,
        backend=backend,
        recompute=config.training.recompute,
        head=build_head(config, shape, groups),
        fields=config.model.transformer,
        fp8=Fp8.of(config.model) if training else None,  # delayed scales are only found by backward passes
    )
    load_initial_weights(chunks, config, shape, backend)
    signed = config.objective.name != "supervised"
    kl_every = 1 if config.objective.kl_coefficient else config.logging.kl_to_base_every if signed else 0
    reference = ReferenceWeights(chunks) if training and kl_every else None
    wrapped, optimizer, sharded = chunks, None, config.parallel.distributed_optimizer
    if training:
        with backend.phase():
            wrapped = wrap_data_parallel(chunks, distributed_optimizer=sharded)
            optimizer = build_optimizer(wrapped, config.optimizer, dtype=dtype, distributed_optimizer=sharded)
    return Actor(
        chunks,
        wrapped,
        optimizer,
        backend,
        groups,
        terms=loss_terms(config.objective),
        own_loss=own_loss,
        reference=reference,
        tokens_per_micro_batch=config.training.tokens_per_micro_batch,
        router_aux_loss=config.objective.router_aux_loss,
        diagnostics=Diagnostics(
            sign_norms_every=config.logging.sign_norms_every if signed else 0,
            probe_every=config.logging.probe_every if signed else 0,
            kl_every=kl_every,
            dropped_share=config.objective.dropped_share,
            seed=config.run.seed,
        ),
    )


def check_transformer(config: Config, shape: ModelShape, backend: Backend) -> None:
    """Raises UserError where `model.transformer` or `model.fp8` asks for what cannot be, before anything is built."""
    model = config.model
    transformer_config(
        shape,
        config.parallel,
        dtype=DTYPES[model.dtype],
        backend=backend,
        recompute=config.training.recompute,
        fields=model.transformer,
        fp8=Fp8.of(model),
    )
    if model.fp8:
        require_fp8(model.fp8)


def build_critic(config: Config, shape: ModelShape, backend: Backend, policy: list[PolicyModel]) -> Critic:
    """Builds the critic at the layout of the policy's chunks, with the weights of their trunk and values of zero."""
    groups = ParallelGroups.current(backend.device)
    dtype, sharded = DTYPES[config.model.dtype], config.parallel.distributed_optimizer

    def head(hidden: torch.Tensor, weight: torch.Tensor, inputs: ValueInputs) -> ValueOutputs:
        return value_head(hidden, weight, inputs, groups.tensor_group if config.parallel.sequence else None)

    chunks = build_policy(
        shape,
        config.parallel,
        dtype=dtype,
        backend=backend,
        recompute=config.training.recompute,
        head=head,
        model=CriticModel,
        fields=config.model.transformer,
        fp8=Fp8.of(config.model),
    )
    copy_trunk(chunks, policy)
    with backend.phase():
        wrapped = wrap_data_parallel(chunks, distributed_optimizer=sharded)
        optimizer = build_optimizer(wrapped, config.optimizer, dtype=dtype, distributed_optimizer=sharded)
    return Critic(chunks, wrapped, optimizer, backend, groups, config.critic, config.objective.kl_coefficient)


def build_head(config: Config, shape: ModelShape, groups: ParallelGroups) -> Head:
    """The LM head as a function of hidden states, its weight shard and a micro-batch's inputs and loss terms."""
    options = HeadOptions(training_temperature(config), config.training.head_chunk_tokens, config.model.head_fp8)

    def head(hidden: torch.Tensor, weight: torch.Tensor, work: HeadWork) -> HeadOutputs:
        start = groups.tensor_rank * len(weight)
        shard = VocabularyShard(start, shape.vocab_size, groups.tensor_group, config.parallel.sequence)
        inputs, terms = work
        return policy_head(hidden, weight, inputs, shard, terms, options)

    return head


def loss_terms(objective: ObjectiveConfig) -> LossTerms:
    return LossTerms(
        form=objective.form,
        eps_low=objective.eps_low,
        eps_high=objective.eps_high,
        dual_clip=objective.dual_clip,
        entropy_coefficient=objective.entropy_coefficient,
        kl_coefficient=0.0 if objective.name == "ppo" else objective.kl_coefficient,  # ppo has it in the reward
        correction_cap=objective.rollout_correction,
    )


def training_temperature(config: Config) -> float:
    """The temperature of the distribution that is trained: the rollouts', and 1 where references are learned."""
    return 1.0 if config.objective.name == "supervised" else config.rollout.temperature


def require_weights(config: Config) -> None:
    """Raises UserError where the weights that `load_initial_weights` reads are not there or cut short."""
    if config.model.initialization == "random":
        return
    if is_checkpoint(config.model.path):
        read_description(Path(config.model.path))
    else:
        SafetensorsDirectory(config.model.path).close()


def load_initial_weights(chunks: list[Any], config: Config, shape: ModelShape, backend: Backend) -> None:
    """Fills the model from a Hugging Face directory, from a checkpoint of ours, or at random (the same at every layout)."""
    path = Path(config.model.path)
    if config.model.initialization == "random":
        load_hf_weights(chunks, shape, random_hf_tensors(shape, config.run.seed))
    elif is_checkpoint(path):
        load_state(path / "state", chunks, None, backend)
    else:
        load_hf_weights(chunks, shape, SafetensorsDirectory(str(path)))
