"""Objectives by name. May import: platform.imports, the rest of objectives."""

from __future__ import annotations

from megatron_nsr.objectives.dr_grpo import GroupCentred
from megatron_nsr.objectives.grpo import GroupRelative
from megatron_nsr.objectives.objective import Objective
from megatron_nsr.objectives.rloo import LeaveOneOut
from megatron_nsr.objectives.signed import SignedObjective
from megatron_nsr.objectives.topr import TaperedReinforce
from megatron_nsr.platform.imports import load_instance


def build_objective(
    name: str,
    *,
    lambda_: float = 0.1,
    regularized: bool = True,
    positive_ratio: tuple[float, float] = (1.0, 1.0),
    negative_ratio: tuple[float, float] = (0.0, 1.0),
) -> Objective:
    """Returns the named objective, or a user's own where `name` is an import path; raises UserError where that leads nowhere.

    regularized: whether the loss has an entropy bonus or a KL term, which samples of weight 0 carry. positive_ratio, negative_ratio:
    where TOPR truncates the importance ratio.
    """
    match name:
        case "psr":
            return SignedObjective(1.0, 0.0)
        case "nsr":
            return SignedObjective(0.0, 1.0)
        case "w_reinforce":
            return SignedObjective(lambda_, 1.0)
        case "reinforce" | "ppo":  # ppo's critic turns these outcomes into advantages of tokens
            return SignedObjective(1.0, 1.0)
        case "grpo" | "dapo":
            return GroupRelative(regularized)
        case "dr_grpo":
            return GroupCentred(regularized)
        case "rloo":
            return LeaveOneOut(regularized)
        case "topr":
            return TaperedReinforce(positive_ratio, negative_ratio)
    objective: Objective = load_instance(name, "objective.name", "weigh(rewards, judged)")
    return objective
