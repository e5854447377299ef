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


def with_defaults(values: Any) -> Any:
    """The configuration as it was read, with what its objective's name and preset say of fields that it leaves out.

    What is no configuration is returned as it is: the schema says what is wrong with it.
    """
    objective = values.get("objective") if isinstance(values, Mapping) else None
    if not isinstance(objective, Mapping):
        return values
    name = objective.get("name")
    return _filled(_filled(values, _of_preset(objective)), OBJECTIVES.get(name, {}) if isinstance(name, str) else {})


def overridden(values: Mapping[str, Any]) -> list[str]:
    """What a complete configuration sets otherwise than its preset, each as `section.field=value (preset: value)`."""
    return [
        f"{section}.{field}={values[section][field]} (preset: {published})"
        for section, fields in _of_preset(values["objective"]).items()
        for field, published in fields.items()
        if values[section][field] != published
    ]


def _of_preset(objective: Mapping[str, Any]) -> Settings:
    preset = objective.get("preset")
    if not isinstance(preset, str) or preset not in PRESETS:
        return {}
    return _filled(WITH_KL if objective.get("name") in KL_OBJECTIVES else {}, PRESETS[preset])


def _filled(values: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    filled = dict(values)
    for section, fields in settings.items():
        given = values.get(section, {})
        if isinstance(given, Mapping):
            filled[section] = {**fields, **given}
    return filled
