"""Names of objectives, which fields of a configuration an objective reads, and what they must be together. May import: presets."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from megatron_nsr.presets import PRESET_OBJECTIVES

NAMES = ("psr", "nsr", "w_reinforce", "reinforce", "grpo", "dr_grpo", "dapo", "rloo", "topr", "ppo", "supervised")

# Objectives, and the fields that they alone read.
_ONLY_FOR = {
    ("w_reinforce",): ("lambda", "lambda_schedule", "lambda_final", "lambda_start_step", "lambda_end_step"),
    ("topr",): ("positive_ratio", "negative_ratio"),
}

# Objectives that compare a prompt's responses with one another: where all are correct or all wrong, they teach nothing.
_GROUP_RELATIVE = ("grpo", "dr_grpo", "dapo", "rloo")


def known_objective(name: str) -> str:
    """The name; raises ValueError unless it is an objective's or looks like an import path, which is followed later."""
    if name in NAMES or ":" in name:
        return name
    nearest = difflib.get_close_matches(name.lower().replace("-", "_"), NAMES, n=1)
    if nearest:
        raise ValueError(f"no such objective; did you mean {nearest[0]}?")
    raise ValueError(f"choose one of {', '.join(NAMES)}, or an import path module:Class")


def check_objective(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raises ValueError where a field is set that the objective does not read, and where fields contradict one another."""
    name = given["name"]

    def refuse(fields: Iterable[str], reason: str) -> None:
        """Fields that differ from their default; one that is spelled out as it is anyway does no harm."""
        for field in fields:
            if given[field] != defaults[field]:
                raise ValueError(f"objective.{field}={given[field]}: {reason}")

    for names, fields in _ONLY_FOR.items():
        if name not in names:
            refuse(fields, f"only name={' or '.join(names)} reads it, and name is {name}")
    if given["form"] != "clipped":
        refuse(("eps_low", "eps_high", "dual_clip"), f"it bounds the ratio of form=clipped, and form is {given['form']}")
    if name == "supervised":
        refuse(("rollout_correction", "sampling_rounds", "kl_coefficient", "nsr_steps"), "it needs rollouts, and name=supervised has none")
        refuse(("normalization", "eps_low", "eps_high", "dual_clip"), "name=supervised makes one update a step, of all its responses")
    if name in ("nsr", "topr"):
        refuse(("nsr_steps",), f"it leads from NSR to an objective with one of the built-in losses, and name is {name}")
    if name == "ppo":
        refuse(("nsr_steps",), "ppo's critic learns from both outcomes from the first step on; critic.warmup_steps lets it learn alone")
    if name in NAMES and name not in _GROUP_RELATIVE:
        learns = f"it would replace prompts that are always or never solved, and name={name} learns from them"
        refuse(("sampling_rounds",), f"{learns}; it is for {', '.join(_GROUP_RELATIVE)}, or an objective of your own")
    if given["preset"] and name not in PRESET_OBJECTIVES:
        raise ValueError(f"objective.preset={given['preset']}: it is for {', '.join(PRESET_OBJECTIVES)}, and name is {name}")
    _check_schedule(given, refuse)
    for field in ("positive_ratio", "negative_ratio"):
        if given[field][0] > given[field][1]:
            raise ValueError(f"objective.{field}={given[field]}: the lower end comes first")


def _check_schedule(given: Mapping[str, Any], refuse: Callable[[Iterable[str], str], None]) -> None:
    if given["lambda_schedule"] == "constant":
        refuse(("lambda_final", "lambda_start_step", "lambda_end_step"), "it needs lambda_schedule linear or cosine, not constant")
    elif given["lambda_end_step"] == 0:
        raise ValueError(
            f"objective.lambda_schedule={given['lambda_schedule']}: it needs lambda_end_step, the first step with lambda_final"
        )
    elif given["lambda_end_step"] <= given["lambda_start_step"]:
        raise ValueError(
            f"objective.lambda_end_step={given['lambda_end_step']}: it must be above lambda_start_step={given['lambda_start_step']}"
        )


def check_learning(name: str, *, steps: int, nsr_steps: int, critic_warmup_steps: int, samples_per_prompt: int) -> None:
    """Raises ValueError where no step of a run would train the policy by the objective that it names. A run of 0 steps trains nothing."""
    for field, taken, others in (
        ("objective.nsr_steps", nsr_steps, f"objective.name={name} would never begin; name=nsr is NSR for the whole run"),
        ("critic.warmup_steps", critic_warmup_steps, "the policy would never learn"),
    ):
        if 0 < steps <= taken:
            raise ValueError(f"{field}={taken}: it must be below run.steps={steps}, or {others}")
    if samples_per_prompt == 1 and name in _GROUP_RELATIVE:
        raise ValueError(
            f"rollout.samples_per_prompt=1: objective.name={name} compares a prompt's responses with one another, and so needs 2 or more"
        )
