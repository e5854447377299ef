"""What an objective's name and a preset fill in, what wins over them, and which fields an objective refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_nsr.config import Config
from megatron_nsr.config_files import dump_config, load_config, parse_config
from megatron_nsr.presets import OBJECTIVES, PRESET_OBJECTIVES, PRESETS, overridden
from megatron_nsr.types import UserError


def values(name: str, **objective: Any) -> dict[str, Any]:
    return {
        "run": {"dir": "runs/a", "steps": 3},
        "model": {"path": "model"},
        "data": {"template": "plain", "prompts_per_step": 8},
        "objective": {"name": name, "mini_batch_prompts": 4} | objective,
    }


def parsed(name: str, **objective: Any) -> Config:
    return parse_config(values(name, **objective))


@pytest.mark.parametrize(
    ("preset", "expected"), [("paper", ("sequence_mean", "batch", 1e-4)), ("paper_code", ("token_mean", "per_sign", 1e-3))]
)
@pytest.mark.parametrize("name", PRESET_OBJECTIVES)
def test_a_preset_fills_what_is_not_given(name: str, preset: str, expected: tuple[str, str, float]) -> None:
    config = parse_config(values(name, preset=preset, mini_batch_prompts=32) | {"data": {"template": "plain", "prompts_per_step": 32}})
    objective = config.objective
    assert (objective.aggregation, objective.normalization, objective.entropy_coefficient) == expected
    assert objective.kl_coefficient == (1e-3 if name in ("grpo", "ppo") else 0.0)  # the paper: KL for GRPO and PPO only


def test_the_public_code_s_critic_makes_32_updates_a_step() -> None:
    sizes = {"data": {"template": "plain", "prompts_per_step": 1024}, "rollout": {"samples_per_prompt": 8}}
    code, paper = (
        parse_config(values("ppo", preset=preset, mini_batch_prompts=256) | sizes).critic.mini_batch_prompts
        for preset in ("paper_code", "paper")
    )
    assert code is not None and (1024 // code, code * 8, paper) == (32, 256, None)
    with pytest.raises(UserError, match=r"critic\.mini_batch_prompts=32 \(objective\.preset=paper_code sets it\) does not divide .*=4"):
        parsed("ppo", preset="paper_code", mini_batch_prompts=4)


def test_what_is_given_wins_over_preset_and_name() -> None:
    objective = parsed("grpo", preset="paper_code", entropy_coefficient=0.0, kl_coefficient=0.5).objective
    assert (objective.entropy_coefficient, objective.kl_coefficient, objective.aggregation) == (0.0, 0.5, "token_mean")
    config = parse_config(values("dapo", eps_high=0.2, sampling_rounds=2) | {"reward": {"truncated": "wrong"}})
    assert (config.objective.eps_high, config.objective.sampling_rounds, config.reward.truncated) == (0.2, 2, "wrong")
    assert config.objective.aggregation == "token_mean"


def test_what_departs_from_a_preset_is_told() -> None:
    def told(*given: str, **objective: Any) -> list[str]:
        return overridden(parsed(*given, **objective).model_dump(by_alias=True))

    assert (
        told("grpo", preset="paper") == told("nsr", preset="paper", entropy_coefficient=1e-4) == told("nsr", aggregation="token_mean") == []
    )
    assert told("dapo") == [] and told("dapo", eps_high=0.2) == ["objective.eps_high=0.2 (published: 0.28)"]
    assert told("nsr", preset="paper", kl_coefficient=0.1) == []  # the paper says nothing of KL there
    assert told("grpo", preset="paper_code", aggregation="sequence_mean", kl_coefficient=0.0) == [
        "objective.kl_coefficient=0.0 (published: 0.001)",
        "objective.aggregation=sequence_mean (published: token_mean)",
    ]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("dr_grpo", {"aggregation": "budget_mean", "form": "clipped", "kl_coefficient": 0.0}),
        ("dapo", {"eps_low": 0.2, "eps_high": 0.28, "aggregation": "token_mean", "sampling_rounds": 10, "kl_coefficient": 0.0}),
        ("rloo", {"form": "reinforce", "aggregation": "budget_mean"}),
        ("topr", {"aggregation": "budget_mean", "positive_ratio": [1.0, 1.0], "negative_ratio": [0.0, 1.0]}),
    ],
)
def test_a_published_objective_comes_with_its_settings(name: str, fields: dict[str, Any]) -> None:
    config = parsed(name)
    assert {field: getattr(config.objective, field) for field in fields} == fields
    assert config.objective.entropy_coefficient == 0.0
    assert config.reward.truncated == ("masked" if name == "dapo" else "wrong")


@pytest.mark.parametrize("name", ["psr", "nsr", "w_reinforce", "reinforce", "grpo", "supervised"])
def test_other_objectives_have_the_schema_s_defaults(name: str) -> None:
    objective = parsed(name).objective
    given = {"name": name, "mini_batch_prompts": 4}
    assert {field: getattr(objective, field) for field in given} == given
    for field, info in type(objective).model_fields.items():
        assert field in given or getattr(objective, field) == info.get_default(), field


@pytest.mark.parametrize(("name", "objective"), [("w_reinforce", {"preset": "paper_code"}), ("grpo", {"preset": "paper"}), ("dapo", {})])
def test_the_resolved_configuration_reads_back_equal(tmp_path: Path, name: str, objective: dict[str, Any]) -> None:
    config, copy = parsed(name, **objective), tmp_path / "config.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config


def test_every_setting_is_a_field_of_the_schema() -> None:
    for settings in (*OBJECTIVES.values(), *PRESETS.values()):
        for section, fields in settings.items():
            assert fields.keys() <= Config.model_fields[section].annotation.model_fields.keys()


@pytest.mark.parametrize("objective", [None, "psr", {"name": 3}, {"name": ["dapo"]}, {"name": "nsr", "preset": "papr"}, {"preset": []}])
def test_what_is_no_configuration_is_left_to_the_schema(objective: Any) -> None:
    with pytest.raises(UserError, match=r"config: objective"):
        parse_config(values("nsr") | {"objective": objective})
    with pytest.raises(UserError, match=r"config: reward='x'"):
        parse_config(values("dapo") | {"reward": "x"})


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("nsr", {"lambda": 0.3}, "objective.lambda=0.3: only name=w_reinforce reads it, and name is nsr"),
        ("grpo", {"lambda_schedule": "linear"}, "objective.lambda_schedule=linear: only name=w_reinforce reads it, and name is grpo"),
        ("reinforce", {"negative_ratio": [0.0, 2.0]}, r"objective.negative_ratio=\[0.0, 2.0\]: only name=topr reads it"),
        ("topr", {"positive_ratio": [2.0, 1.0]}, r"objective.positive_ratio=\[2.0, 1.0\]: the lower end comes first"),
        ("ppo", {"nsr_steps": 3}, "objective.nsr_steps=3: ppo's critic learns from both outcomes from the first step on"),
        ("topr", {"nsr_steps": 3}, "objective.nsr_steps=3: it leads from NSR to an objective with one of the built-in losses"),
        ("rloo", {"eps_high": 0.3}, "objective.eps_high=0.3: it bounds the ratio of form=clipped, and form is reinforce"),
        ("nsr", {"form": "probability", "dual_clip": 3.0}, "objective.dual_clip=3.0: it bounds the ratio of form=clipped"),
        ("supervised", {"kl_coefficient": 0.1}, "objective.kl_coefficient=0.1: it needs rollouts, and name=supervised has none"),
        ("supervised", {"normalization": "per_sign"}, "objective.normalization=per_sign: name=supervised makes one update a step"),
        ("supervised", {"eps_low": 0.3}, "objective.eps_low=0.3: name=supervised makes one update a step"),
        ("supervised", {"sampling_rounds": 2}, "objective.sampling_rounds=2: it needs rollouts"),
        ("nsr", {"sampling_rounds": 2}, "objective.sampling_rounds=2: it would replace prompts that are always or never solved"),
        (
            "ppo",
            {"sampling_rounds": 2},
            "it would replace prompts .* and name=ppo learns from them; it is for grpo, dr_grpo, dapo, rloo, or an objective of your own",
        ),
        ("dapo", {"preset": "paper"}, "objective.preset=paper: it is for psr, nsr, w_reinforce, reinforce, grpo, ppo, and name is dapo"),
        ("w_reinforce", {"lambda_final": 2.0}, "objective.lambda_final=2.0: it needs lambda_schedule linear or cosine"),
        ("w_reinforce", {"lambda_schedule": "linear"}, "objective.lambda_schedule=linear: it needs lambda_end_step, the first step with"),
        (
            "w_reinforce",
            {"lambda_schedule": "cosine", "lambda_start_step": 5, "lambda_end_step": 5},
            "objective.lambda_end_step=5: it must be above lambda_start_step=5",
        ),
    ],
)
def test_a_field_that_the_objective_would_not_read_is_refused(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parsed(name, **fields)


def test_a_field_spelled_out_as_it_is_anyway_does_no_harm() -> None:
    assert parsed("nsr", **{"lambda": 0.1}, negative_ratio=[0.0, 1.0]).objective.name == "nsr"
