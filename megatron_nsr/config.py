"""The configuration: one strict model, YAML in, dotted overrides, and what its fields demand of one another.

May import: types, presets, objective_fields, config_sections. `config_files` reads it.
"""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from megatron_nsr.config_sections import (
    CheckpointConfig,
    CriticConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    Section,
    TrainingConfig,
)
from megatron_nsr.objective_fields import check_learning, check_objective
from megatron_nsr.presets import with_defaults

__all__ = [
    "CheckpointConfig",
    "Config",
    "CriticConfig",
    "DataConfig",
    "EvaluationConfig",
    "LoggingConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "Section",
    "TrainingConfig",
]


class Config(Section):
    """The whole of a run."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig
    critic: CriticConfig = CriticConfig()
    parallel: ParallelConfig = ParallelConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, values: Any) -> Any:
        return with_defaults(values)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        data, objective, parallel = self.data, self.objective, self.parallel
        if data.prompts_per_step % objective.mini_batch_prompts and objective.name != "supervised":
            raise ValueError(
                f"objective.mini_batch_prompts={objective.mini_batch_prompts} does not divide data.prompts_per_step={data.prompts_per_step}"
            )
        check_objective(objective.model_dump(by_alias=True), _defaults(ObjectiveConfig))
        check_learning(
            objective.name,
            steps=self.run.steps,
            nsr_steps=objective.nsr_steps,
            critic_warmup_steps=self.critic.warmup_steps,
            samples_per_prompt=self.rollout.samples_per_prompt,
        )
        self._consistent_servers()
        self._consistent_memory()
        self._consistent_critic()
        self._consistent_fp8()
        if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
            raise ValueError(f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs parallel.pipeline of 2 or more, not 1")
        if parallel.sequence and parallel.tensor == 1:
            raise ValueError("parallel.sequence=true needs parallel.tensor of 2 or more, not 1")
        if data.validation is not None and self.evaluation.benchmarks.get("validation") is not None:
            raise ValueError("evaluation.benchmarks.validation: data.validation takes this name; give the benchmark another")
        if self.optimizer.min_learning_rate > self.optimizer.learning_rate:
            low, high = self.optimizer.min_learning_rate, self.optimizer.learning_rate
            raise ValueError(f"optimizer.min_learning_rate={low} is above optimizer.learning_rate={high}")
        return self

    def _consistent_critic(self) -> None:
        critic, low, prompts = self.critic, self.optimizer.min_learning_rate, self.objective.mini_batch_prompts
        if self.objective.name != "ppo":
            for name, info in CriticConfig.model_fields.items():
                if (value := getattr(critic, name)) != info.default:
                    raise ValueError(
                        f"critic.{info.alias or name}={value}: only objective.name=ppo has a critic, not {self.objective.name}"
                    )
        elif low > critic.learning_rate:
            raise ValueError(f"optimizer.min_learning_rate={low} is above critic.learning_rate={critic.learning_rate}")
        elif critic.mini_batch_prompts and prompts % critic.mini_batch_prompts:
            origin = " (objective.preset=paper_code sets it)" if self.objective.preset == "paper_code" else ""
            raise ValueError(
                f"critic.mini_batch_prompts={critic.mini_batch_prompts}{origin} does not divide objective.mini_batch_prompts={prompts}; "
                f"critic.mini_batch_prompts={prompts} makes one update a mini-batch of the policy"
            )

    def _consistent_fp8(self) -> None:
        model, quantization = self.model, self.rollout.quantization
        if quantization and model.dtype != "bfloat16":
            raise ValueError(f"rollout.quantization={quantization} needs model.dtype=bfloat16, not {model.dtype}")
        recipe, edge = f"model.fp8={model.fp8}", f"model.fp8_edge_layers={model.fp8_edge_layers}"
        if model.fp8 is None:
            if model.fp8_edge_layers:
                raise ValueError(f"{edge}: without model.fp8 all layers are in model.dtype; set it to 0")
        elif model.backend == "cpu":
            raise ValueError(f"{recipe} needs model.backend=te, Transformer Engine on a GPU, not cpu")
        elif model.dtype != "bfloat16":
            raise ValueError(f"{recipe} needs model.dtype=bfloat16, not {model.dtype}")
        elif model.fp8 == "delayed" and model.fp8_edge_layers:
            raise ValueError(f"{edge} needs model.fp8=tensorwise or blockwise: delayed scaling is for all layers")
        elif model.fp8 == "delayed" and self.rollout.max_logprob_gap is not None:
            raise ValueError(
                f"rollout.max_logprob_gap={self.rollout.max_logprob_gap:g} needs model.fp8=tensorwise or blockwise: with delayed scaling "
                "a process's first log-probs are computed without scales, and would stop it; or set it to null"
            )

    def _consistent_memory(self) -> None:
        for field, value in (("training.offload", self.training.offload), ("rollout.sleep_level", self.rollout.sleep_level)):
            if value in ("none", 0):
                continue
            if self.rollout.mode == "server":
                raise ValueError(f"{field}={value} needs rollout.mode=colocated: servers share no GPU with the policy")
            if self.objective.name == "supervised":
                raise ValueError(f"{field}={value}: objective.name=supervised samples nothing between its updates")

    def _consistent_servers(self) -> None:
        rollout, correction = self.rollout, self.objective.rollout_correction
        if rollout.mode == "server" and not rollout.servers:
            raise ValueError("rollout.servers: rollout.mode=server needs at least one; start it with `megatron-nsr serve CONFIG`")
        if rollout.mode == "colocated" and rollout.servers:
            raise ValueError("rollout.servers: rollout.mode=colocated uses none; set rollout.mode=server, or leave them out")
        if len(set(rollout.servers)) < len(rollout.servers):
            raise ValueError(f"rollout.servers={rollout.servers}: an address stands there twice")
        if rollout.max_staleness and rollout.mode == "colocated":
            raise ValueError("rollout.max_staleness=1 needs rollout.mode=server: an engine in the training process samples between steps")
        if rollout.max_staleness and self.objective.name == "supervised":
            raise ValueError("rollout.max_staleness=1 needs rollouts, and objective.name=supervised has none")
        if rollout.max_staleness and correction is None:
            raise ValueError(
                "rollout.max_staleness=1 needs objective.rollout_correction, the cap of the importance weight of responses "
                "that older weights drew; 2.0 is usual"
            )


def _defaults(section: type[Section]) -> dict[str, Any]:
    """The fields' defaults by the names that users write."""
    return {info.alias or name: info.get_default() for name, info in section.model_fields.items()}
