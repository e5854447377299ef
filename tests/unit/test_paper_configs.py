"""configs/paper: the paper's values in every experiment's file, and no difference between two files that is not the experiment's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_nsr.config import Config
from megatron_nsr.config_files import load_config
from megatron_nsr.presets import overridden

FOLDER = Path(__file__).parents[2] / "configs" / "paper"
OBJECTIVES = ("psr", "nsr", "w_reinforce", "reinforce", "grpo", "ppo")
LAMBDAS = {"lambda_0.05": 0.05, "lambda_0.2": 0.2, "lambda_0.5": 0.5}
TWO_FIFTY_SIX = {"samples": 256, "temperature": 0.6, "top_p": 0.95, "top_k": -1}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2.5_math_7b": {"context": 4096, "template": "qwen2.5-math", "evaluation": TWO_FIFTY_SIX},
    "qwen3_4b": {"context": 32768, "template": "qwen3", "evaluation": {"samples": 64, "temperature": 0.7, "top_p": 0.8, "top_k": 20}},
    "llama3.1_8b_instruct": {"context": 4096, "template": "llama3.1", "evaluation": TWO_FIFTY_SIX},
}
EXPERIMENTS = [(model, name) for model in MODELS for name in ("base", *OBJECTIVES)] + [("qwen2.5_math_7b", name) for name in LAMBDAS]


def load(model: str, name: str) -> Config:
    return load_config(FOLDER / model / f"{name}.yaml")


def flat(config: Config) -> dict[str, Any]:
    sections = config.model_dump(by_alias=True)
    return {f"{section}.{key}": value for section, fields in sections.items() for key, value in fields.items()}


def test_every_experiment_has_its_file_and_every_file_is_an_experiment() -> None:
    files = {(path.parent.name, path.stem) for path in FOLDER.glob("*/*.yaml")}
    assert files == {*EXPERIMENTS, *((model, "model") for model in MODELS)}


@pytest.mark.parametrize(("model", "name"), EXPERIMENTS)
def test_an_experiment_has_the_papers_values(model: str, name: str) -> None:
    config, expected = load(model, name), MODELS[model]
    assert (config.data.prompts_per_step, config.rollout.samples_per_prompt, config.rollout.temperature) == (1024, 8, 1.0)
    assert config.data.max_prompt_tokens + config.rollout.max_response_tokens == expected["context"]
    assert (config.data.template, config.reward.grader) == (expected["template"], "math_verify")
    objective = config.objective
    assert (objective.mini_batch_prompts, objective.eps_low, objective.eps_high, objective.entropy_coefficient) == (256, 0.2, 0.2, 1e-4)
    assert (objective.aggregation, objective.normalization) == ("sequence_mean", "batch")
    assert objective.kl_coefficient == (1e-3 if name in ("grpo", "ppo") else 0.0)
    assert (config.optimizer.learning_rate, config.critic.learning_rate) == (1e-6, 1e-5)
    assert config.evaluation.model_dump(include=set(expected["evaluation"])) == expected["evaluation"]
    assert set(config.evaluation.benchmarks) == {"MATH", "AIME2025", "AMC23"}


@pytest.mark.parametrize(("model", "name"), EXPERIMENTS)
def test_an_experiment_differs_from_its_neighbours_only_in_what_it_changes(model: str, name: str) -> None:
    reference, mine = flat(load(model, "reinforce")), flat(load(model, name))
    changed = {key: value for key, value in mine.items() if value != reference[key]}
    assert changed.pop("run.dir", None) == (None if name == "reinforce" else f"runs/paper/{model}/{name}")
    expected: dict[str, dict[str, Any]] = {
        "base": {"run.steps": 0},
        "reinforce": {},
        "grpo": {"objective.name": "grpo", "objective.kl_coefficient": 1e-3},
        "ppo": {"objective.name": "ppo", "objective.kl_coefficient": 1e-3},
    }
    lambda_ = {} if LAMBDAS.get(name, 0.1) == 0.1 else {"objective.lambda": LAMBDAS[name]}
    assert changed == expected.get(name, {"objective.name": "w_reinforce" if name in LAMBDAS else name, **lambda_})


def test_models_differ_only_in_what_belongs_to_a_model() -> None:
    whole = {model: flat(load(model, "nsr")) for model in MODELS}
    first = whole["qwen2.5_math_7b"]
    for other in whole.values():
        differing = {key for key, value in other.items() if value != first[key]}
        sampling = {f"evaluation.{key}" for key in ("preset", "samples", "temperature", "top_p", "top_k")}
        budgets = {"rollout.max_response_tokens", "training.tokens_per_micro_batch"}
        assert differing <= {"run.dir", "model.path", "data.template"} | budgets | sampling


@pytest.mark.parametrize(("name", "more"), [("rloo", []), ("dr_grpo", []), ("topr", []), ("dapo", ["objective.eps_high=0.28"])])
def test_another_objective_without_the_preset_is_as_it_was_published(name: str, more: list[str]) -> None:
    config = load_config(FOLDER / "qwen2.5_math_7b" / "reinforce.yaml", [f"objective.name={name}", "objective.preset=null", *more])
    assert overridden(config.model_dump(by_alias=True)) == []
    assert config.run.dir == f"runs/paper/qwen2.5_math_7b/{name}"
