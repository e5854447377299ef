"""From a configuration to the parts of a run: data, policy, engine, graders. Cheap checks come first, slow starts last.

May import: everything below the trainer.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_nsr.config import Config
from megatron_nsr.data.prompts import PromptSet, load_prompts
from megatron_nsr.data.sampler import PromptSampler
from megatron_nsr.data.tokenizers import Tokenizer, load_tokenizer
from megatron_nsr.data.validation import hold_out, require_disjoint
from megatron_nsr.evaluation.benchmarks import Benchmarks
from megatron_nsr.experience import ExperienceSource, GradedRollouts, References, require_responses
from megatron_nsr.models.backends import Backend, choose_backend
from megatron_nsr.models.hf_config import ModelShape, read_model_shape
from megatron_nsr.models.parallel import validate_layout
from megatron_nsr.objectives.objective import Objective, OwnLoss
from megatron_nsr.objectives.registry import build_objective
from megatron_nsr.objectives.schedule import LambdaSchedule, ObjectiveSchedule
from megatron_nsr.phases import Phases
from megatron_nsr.platform import distributed
from megatron_nsr.rewards.pool import GraderPool
from megatron_nsr.rollout.engines import build_engine, check_engine, engine_ranks
from megatron_nsr.rollout.rollouts import Rollouts
from megatron_nsr.rollout.vllm_engine import VllmEngine
from megatron_nsr.training.actor import Actor
from megatron_nsr.training.critic import Critic
from megatron_nsr.training.offload import Offload
from megatron_nsr.training.setup import build_actor, build_critic, check_transformer, require_weights, training_temperature
from megatron_nsr.types import UserError
from megatron_nsr.weights.checksums import policy_checksums
from megatron_nsr.weights.gathering import execute_push_plan, plan_for
from megatron_nsr.weights.push_plan import MIB, PushPlan

VALIDATION = "validation"  # the benchmark that data.validation makes


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything that is read and checked before anything slow starts."""

    shape: ModelShape
    tokenizer: Tokenizer
    backend: Backend
    train: PromptSet | None
    sampler: PromptSampler | None  # of `train`
    benchmarks: dict[str, PromptSet]  # data.validation among them, as `validation`
    objective: Objective | None  # None: supervised
    server_weights: frozenset[str]  # HF names; empty where the engine is no server


def read_inputs(config: Config, *, training: bool) -> Inputs:
    """Reads model description, tokenizer and data; raises UserError for whatever is missing, broken or impossible."""
    shape = read_model_shape(config.model.path)
    world_size = distributed.launched_world_size()
    validate_layout(config.parallel, shape, world_size)
    if config.objective.router_aux_loss and shape.moe is None:
        raise UserError(f"objective.router_aux_loss={config.objective.router_aux_loss}: the model has no experts; it must be 0")
    backend = choose_backend(config.model.backend)
    check_transformer(config, shape, backend)
    tokenizer = load_tokenizer(config.model.path)
    if tokenizer.vocab_size > shape.vocab_size:
        raise UserError(f"model.path={config.model.path}: the tokenizer knows {tokenizer.vocab_size} ids, the model has {shape.vocab_size}")
    require_weights(config)
    objective = None
    if config.objective.name != "supervised":
        settings = config.objective
        objective = build_objective(
            settings.name,
            lambda_=settings.lambda_,
            regularized=settings.entropy_coefficient > 0 or settings.kl_coefficient > 0,
            positive_ratio=(settings.positive_ratio[0], settings.positive_ratio[1]),
            negative_ratio=(settings.negative_ratio[0], settings.negative_ratio[1]),
        )
        _check_own_loss(objective, config)
    if training and config.data.train is None:
        raise UserError("data.train: required for training, but not given")
    data = config.data
    train = _read(config, tokenizer, data.train, "data.train", data.limit) if training and data.train else None
    benchmarks = {
        name: _read(config, tokenizer, path, _field(name), config.evaluation.limit)
        for name, path in config.evaluation.benchmarks.items()
        if path is not None
    }
    sampler = None
    if train is not None:
        train, validation = _set_apart(config, tokenizer, train, benchmarks)
        benchmarks |= validation
        if config.objective.name == "supervised":
            require_responses(train.prompts, str(data.train))
        sampler = PromptSampler(len(train.prompts), data.prompts_per_step, seed=config.run.seed, shuffle=data.shuffle)
    _check_lengths(config, shape.max_positions, train, benchmarks)
    samples = objective is not None or bool(benchmarks)
    return Inputs(
        shape=shape,
        tokenizer=tokenizer,
        backend=backend,
        train=train,
        sampler=sampler,
        benchmarks=benchmarks,
        objective=objective,
        server_weights=check_engine(config, shape, world_size=world_size, samples=samples),
    )


@dataclass(frozen=True, slots=True)
class Components:
    """The running parts. `rollouts` and `graders` are absent where nothing is sampled (supervised without benchmarks).

    critic: where the objective is ppo and the run trains.
    """

    actor: Actor
    critic: Critic | None
    rollouts: Rollouts | None
    graders: GraderPool | None
    benchmarks: Benchmarks | None
    source: ExperienceSource
    push_plan: PushPlan
    fp8_rollouts: bool  # the engine rounds what is pushed
    phases: Phases

    @property
    def pushes_every_step(self) -> bool:
        """Whether the next step samples from the new weights."""
        return isinstance(self.source, GradedRollouts)

    def push(self, version: int) -> dict[str, float]:
        """Gathers the policy's weights and hands them to the engine as `version`; returns metrics. A collective call."""
        if self.rollouts is None:
            return {}
        self.phases.push()
        plan, chunks = self.push_plan, self.actor.chunks
        checksums = partial(policy_checksums, plan, chunks, fp8_rows=self.fp8_rollouts)
        return self.rollouts.push(execute_push_plan(plan, chunks), version, checksums)


def build_components(config: Config, inputs: Inputs, stack: ExitStack) -> Components:
    """Starts graders, policy and engine, in that order; `stack` closes them in the reverse one."""
    samples = config.objective.name != "supervised" or bool(inputs.benchmarks)
    graders = rollouts = benchmarks = None
    if samples:
        reward = config.reward
        graders = stack.enter_context(
            GraderPool(
                reward.grader,
                workers=reward.workers,
                timeout_s=reward.timeout_s,
                memory_limit_mib=reward.memory_limit_mib,
                cache_size=reward.cache_size,
            )
        )
    distributed.init_process_group()
    own_loss = inputs.objective if isinstance(inputs.objective, OwnLoss) else None
    actor = build_actor(config, inputs.shape, inputs.backend, own_loss=own_loss, training=inputs.train is not None)
    with_critic = config.objective.name == "ppo" and inputs.train is not None
    critic = build_critic(config, inputs.shape, inputs.backend, actor.chunks) if with_critic else None
    phases = Phases(Offload([actor, critic] if critic else [actor], config.training.offload), config.rollout.sleep_level)
    if graders is not None:
        phases.sample()  # an engine takes its share of what is free when it starts
        rollouts = _build_rollouts(config, inputs, stack, phases)
        phases.train()
        benchmarks = Benchmarks(
            inputs.benchmarks,
            rollouts,
            graders,
            phases,
            config.evaluation,
            config.reward,
            training_temperature=training_temperature(config),
            max_response_tokens=config.rollout.max_response_tokens,
            stop_ids=inputs.tokenizer.stop_ids,
        )
    source: ExperienceSource = References(inputs.tokenizer, config)
    if inputs.objective is not None and rollouts is not None and graders is not None:
        source = GradedRollouts(rollouts, graders, _schedule(inputs.objective, config), config, inputs.tokenizer.stop_ids)
    plan = plan_for(actor.chunks, inputs.shape, config.rollout.push_bucket_mib * MIB)
    return Components(actor, critic, rollouts, graders, benchmarks, source, plan, config.rollout.quantization == "fp8", phases)


def _schedule(objective: Objective, config: Config) -> ObjectiveSchedule:
    settings = config.objective
    if settings.lambda_schedule == "constant":
        return ObjectiveSchedule(objective, settings.nsr_steps)
    moving = LambdaSchedule(
        settings.lambda_, settings.lambda_final, settings.lambda_schedule, settings.lambda_start_step, settings.lambda_end_step
    )
    return ObjectiveSchedule(objective, settings.nsr_steps, moving)


def _build_rollouts(config: Config, inputs: Inputs, stack: ExitStack, phases: Phases) -> Rollouts:
    engine = build_engine(config, inputs.shape, inputs.server_weights)
    if isinstance(engine, VllmEngine):
        phases.engine = engine
    rollouts = Rollouts(
        engine,
        inputs.tokenizer.decode,
        run_seed=config.run.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        engine_ranks=engine_ranks(config, distributed.world_size()),
        verify_push=config.rollout.verify_push,
    )
    return stack.enter_context(rollouts)  # closes the engine too


def _set_apart(
    config: Config, tokenizer: Tokenizer, train: PromptSet, benchmarks: Mapping[str, PromptSet]
) -> tuple[PromptSet, dict[str, PromptSet]]:
    """What is trained on, and the problems of data.validation as one more benchmark where there are any."""
    data = config.data
    if data.validation is None:
        return train, {}
    if isinstance(data.validation, int):
        train, chosen = hold_out(train, data.validation, seed=data.validation_seed)
    else:
        chosen = _read(config, tokenizer, data.validation, _field(VALIDATION), None)
    others = {"data.train": train} | {_field(name): problems for name, problems in benchmarks.items()}
    require_disjoint(chosen, str(data.validation), others)
    return train, {VALIDATION: chosen}


def _check_own_loss(objective: Objective, config: Config) -> None:
    """Raises UserError where an objective with a loss of its own is given settings of the built-in ones: they would do nothing."""
    if isinstance(objective, OwnLoss):
        if config.rollout.max_staleness:  # it asks for rollout_correction, which weighs the built-in losses only
            raise UserError(
                f"rollout.max_staleness={config.rollout.max_staleness}: it must be 0, as objective.name={config.objective.name!r} brings "
                "its own token_loss, which nothing corrects for older weights"
            )
        given = config.objective.model_fields_set
        for name in ("form", "eps_low", "eps_high", "dual_clip", "rollout_correction", "nsr_steps"):
            field = type(config.objective).model_fields[name]
            if name in given and (value := getattr(config.objective, name)) != field.default:
                raise UserError(f"objective.{name}={value!r}: objective.name={config.objective.name!r} brings its own token_loss")


def _check_lengths(config: Config, max_positions: int, train: PromptSet | None, benchmarks: dict[str, PromptSet]) -> None:
    """Raises UserError where a prompt and a full response are longer than the model can read: the response would be cut short silently."""
    sets = {"data.train": train} | {_field(name): prompts for name, prompts in benchmarks.items()}
    for field, prompts in sets.items():
        if prompts is None:
            continue
        longest = max(len(prompt.token_ids) for prompt in prompts.prompts)
        name, budget = "rollout.max_response_tokens", config.rollout.max_response_tokens
        if prompts is not train and config.evaluation.max_response_tokens:
            name, budget = "evaluation.max_response_tokens", config.evaluation.max_response_tokens
        if longest + budget > max_positions:
            raise UserError(
                f"{name}={budget}: with the longest prompt of {field}, {longest} tokens, it passes the model's "
                f"max_position_embeddings={max_positions}; lower it, or data.max_prompt_tokens={config.data.max_prompt_tokens}"
            )


def _field(benchmark: str) -> str:
    """Where the config names a benchmark's problems."""
    return "data.validation" if benchmark == VALIDATION else f"evaluation.benchmarks.{benchmark}"


def _read(config: Config, tokenizer: Tokenizer, path: str, field: str, limit: int | None) -> PromptSet:
    data = config.data
    return load_prompts(
        Path(path), field=field, tokenizer=tokenizer, template=data.template, max_prompt_tokens=data.max_prompt_tokens, limit=limit
    )
