"""Settings that come with an objective's name, or with a preset, where a configuration is silent. May import: types.

What is given always wins; then comes the preset, then the name, then the schema's default. docs/objectives.md has the reasons.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Settings = dict[str, dict[str, Any]]  # section: field: value

# As published. Their papers train without an entropy bonus.
OBJECTIVES: dict[str, Settings] = {
    "dr_grpo": {"objective": {"aggregation": "budget_mean", "entropy_coefficient": 0.0}},
    "dapo": {
        "objective": {"eps_high": 0.28, "aggregation": "token_mean", "sampling_rounds": 10, "entropy_coefficient": 0.0},
        "reward": {"truncated": "masked"},
    },
    "rloo": {"objective": {"form": "reinforce", "aggregation": "budget_mean", "entropy_coefficient": 0.0}},
    "topr": {"objective": {"aggregation": "budget_mean", "entropy_coefficient": 0.0}},
}

# arXiv 2506.01347, section D.1, and the settings of its public code.
PRESETS: dict[str, Settings] = {
    "paper": {"objective": {"aggregation": "sequence_mean", "normalization": "batch", "entropy_coefficient": 1e-4}},
    "paper_code": {"objective": {"aggregation": "token_mean", "normalization": "per_sign", "entropy_coefficient": 1e-3}},
}
PRESET_OBJECTIVES = ("psr", "nsr", "w_reinforce", "reinforce", "grpo", "ppo")
WITH_KL: Settings = {"objective": {"kl_coefficient": 1e-3}}  # of these, under either preset
KL_OBJECTIVES = ("grpo", "ppo")
# 256 of 8,192 responses an update of the critic: its public code counts responses there, and prompts for the policy.
CODE_CRITIC: Settings = {"critic": {"mini_batch_prompts": 32}}


def with_defaults(values: Any) -> Any:
    """The configuration as it was read, with what its objective's name and preset say of fields that it leaves out.

    What is no configuration is returned as it is: the schema says what is wrong with it.
    """
    objective = values.get("objective") if isinstance(values, Mapping) else None
    if not isinstance(objective, Mapping):
        return values
    return _filled(values, published(objective))


def overridden(values: Mapping[str, Any]) -> list[str]:
    """What a complete configuration sets otherwise than it was published, each as `section.field=value (published: value)`."""
    return [
        f"{section}.{field}={values[section][field]} (published: {value})"
        for section, fields in published(values["objective"]).items()
        for field, value in fields.items()
        if values[section][field] != value
    ]


def published(objective: Mapping[str, Any]) -> Settings:
    """What the preset and the name of an objective, right or wrong ones, say of fields."""
    name, preset = objective.get("name"), objective.get("preset")
    settings: Settings = OBJECTIVES.get(name, {}) if isinstance(name, str) else {}
    if isinstance(preset, str) and preset in PRESETS:
        settings = _filled(settings, PRESETS[preset])
        if name in KL_OBJECTIVES:
            settings = _filled(settings, WITH_KL)
        if (preset, name) == ("paper_code", "ppo"):
            settings = _filled(settings, CODE_CRITIC)
    return settings


def _filled(values: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    filled = dict(values)
    for section, fields in settings.items():
        given = values.get(section, {})
        if isinstance(given, Mapping):
            filled[section] = {**fields, **given}
    return filled
