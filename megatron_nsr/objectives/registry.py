"""Objectives by name. May import: platform.imports, the rest of objectives."""

from __future__ import annotations

from megatron_nsr.objectives.grpo import GroupRelative
from megatron_nsr.objectives.objective import Objective
from megatron_nsr.objectives.signed import SignedObjective
from megatron_nsr.platform.imports import load_instance
from megatron_nsr.types import UserError

NAMES = ("psr", "nsr", "w_reinforce", "reinforce", "grpo")


def build_objective(name: str, *, lambda_: float, entropy_coefficient: float) -> Objective:
    """Returns the named objective, or a user's own where `name` is an import path; raises UserError otherwise."""
    match name:
        case "psr":
            return SignedObjective(1.0, 0.0)
        case "nsr":
            return SignedObjective(0.0, 1.0)
        case "w_reinforce":
            return SignedObjective(lambda_, 1.0)
        case "reinforce":
            return SignedObjective(1.0, 1.0)
        case "grpo":
            return GroupRelative(carries_entropy=entropy_coefficient > 0)
    if ":" in name:
        objective: Objective = load_instance(name, "objective.name", "weigh(rewards, judged)")
        return objective
    raise UserError(f"objective.name={name!r}: choose one of {', '.join((*NAMES, 'supervised'))}, or an import path module:Class")
