"""What an objective is: it turns a step's verdicts into signed sample weights and says which samples to keep.

May import: types. Pure tensor functions: no model, no process group. An objective may also bring a loss of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from megatron_nsr.types import TrainBatch


@dataclass(frozen=True, slots=True)
class SampleWeights:
    """Signed weights and what is kept; a sample whose whole loss is identically zero is not kept."""

    weights: Float[Tensor, "prompts samples"]
    kept: Bool[Tensor, "prompts samples"]


@runtime_checkable
class OwnLoss(Protocol):
    """What an objective has beside `weigh` when its loss is none of the built-in forms, such as a ratio of whole sequences.

    The head then computes logits twice, since the gradient is not known in advance. Entropy bonus and aggregation stay as configured.
    """

    def token_loss(self, logprobs: Float[Tensor, "tokens"], entropy: Float[Tensor, "tokens"], batch: TrainBatch) -> Float[Tensor, "tokens"]:
        """The loss of each token before `batch.scale`, differentiable in log-prob and entropy, on one packed micro-batch.

        Tokens outside `batch.response_mask` have log-prob 0 and count for nothing. `batch.old_logprobs` is None when on-policy.
        """
        ...


class Objective(Protocol):
    """A user's own objective is such a class, constructed without arguments and named in the config as module:Class."""

    def weigh(self, rewards: Float[Tensor, "prompts samples"], judged: Bool[Tensor, "prompts samples"]) -> SampleWeights:
        """rewards are +1 or -1 where `judged`; elsewhere there is no verdict and nothing may be kept."""
        ...
