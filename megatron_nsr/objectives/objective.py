"""What an objective is: it turns a step's verdicts into signed sample weights and says which samples to keep.

May import: types. Pure tensor functions: no model, no process group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SampleWeights:
    """Signed weights and what is kept; a sample whose whole loss is identically zero is not kept."""

    weights: Float[Tensor, "prompts samples"]
    kept: Bool[Tensor, "prompts samples"]


class Objective(Protocol):
    """A user's own objective is such a class, constructed without arguments and named in the config as module:Class."""

    def weigh(self, rewards: Float[Tensor, "prompts samples"], judged: Bool[Tensor, "prompts samples"]) -> SampleWeights:
        """rewards are +1 or -1 where `judged`; elsewhere there is no verdict and nothing may be kept."""
        ...
