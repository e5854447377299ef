"""What goes into the head beside hidden states and weight, and what comes out.

May import: losses.terms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from megatron_nsr.losses.terms import LossTerms, TokenInputs

# (log-prob [tokens], entropy [tokens]) -> policy loss of each token before `scale`, by differentiable operations
OwnLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class HeadInputs:
    """One micro-batch. Without `weights` the head only measures: no loss, no gradient.

    rows: the tokens that the head looks at, ascending; the others (prompts, padding) cost nothing and have zeros in every output.
    own_loss: in place of the terms' policy loss; its gradient is known only in the backward pass, so logits are computed twice.
    gradient_scale: multiplies the returned loss. loss_gradient: what the backward pass will bring for that loss (loss scale over
    micro-batches); it enters the gradient here, and a backward pass that brings anything else is an error.
    """

    targets: Int[Tensor, "tokens"]
    weights: Float[Tensor, "tokens"] | None = None  # signed
    scale: Float[Tensor, "tokens"] | None = None  # of each token in the loss; 0 masks it
    old_logprobs: Float[Tensor, "tokens"] | None = None  # None: on-policy
    reference_logprobs: Float[Tensor, "tokens"] | None = None  # for a KL term
    rollout_logprobs: Float[Tensor, "tokens"] | None = None  # for a rollout correction
    rows: Int[Tensor, "rows"] | None = None  # None: all
    own_loss: OwnLoss | None = None
    gradient_scale: float = 1.0
    loss_gradient: float = 1.0
    measure_entropy: bool = True  # without it, and without an entropy bonus, entropy is 0 and costs nothing; for callers of their own
    sign_norms: bool = False  # also return input_grad_sq; with an entropy bonus a fourth product, else free

    def __post_init__(self) -> None:
        if (self.weights is None) != (self.scale is None):
            raise ValueError("give weights and scale together: a loss needs both, measuring neither")
        if self.own_loss is not None and self.weights is None:
            raise ValueError("own_loss without weights and scale: the head would only measure")

    @property
    def trains(self) -> bool:
        return self.weights is not None

    def check_lengths(self, tokens: int) -> None:
        """Raises ValueError unless there is one number a token everywhere: one for all would be broadcast silently."""
        for name in ("targets", "weights", "scale", "old_logprobs", "reference_logprobs", "rollout_logprobs"):
            vector = getattr(self, name)
            if vector is not None and vector.shape != (tokens,):
                raise ValueError(f"{name} has shape {tuple(vector.shape)} beside {tokens} hidden states")

    def check(self, terms: LossTerms) -> None:
        """Raises ValueError where a term lacks what it is made of."""
        if terms.kl_coefficient and self.reference_logprobs is None:
            raise ValueError(f"kl_coefficient={terms.kl_coefficient} needs reference_logprobs")
        if terms.correction_cap is not None and self.rollout_logprobs is None:
            raise ValueError(f"correction_cap={terms.correction_cap} needs rollout_logprobs")

    def tokens(self, rows: slice | Tensor) -> TokenInputs:
        """The part of a chunk's tokens."""
        assert self.weights is not None and self.scale is not None
        return TokenInputs(
            self.weights[rows],
            self.scale[rows],
            _part(self.old_logprobs, rows),
            _part(self.reference_logprobs, rows),
            _part(self.rollout_logprobs, rows),
        )


@dataclass(frozen=True, slots=True)
class HeadOutputs:
    """All [tokens]; `loss` is the sum to call backward on, times gradient_scale; the rest is detached.

    clipped: whether the clip took the token's gradient; None with an own loss, whose clip is its own affair.
    input_grad_sq: squared norm of what the token's loss sends into its hidden state, the entropy bonus excluded, summed over the
    vocabulary's shards before it is squared. Only with `sign_norms`, and never with an own loss.
    """

    loss: Float[Tensor, ""]
    logprobs: Float[Tensor, "tokens"]
    entropy: Float[Tensor, "tokens"]
    token_loss: Float[Tensor, "tokens"]
    clipped: Bool[Tensor, "tokens"] | None
    input_grad_sq: Float[Tensor, "tokens"] | None = None

    @classmethod
    def zeros(cls, tokens: int, dtype: torch.dtype, device: torch.device, *, sign_norms: bool) -> HeadOutputs:
        """To be filled chunk by chunk."""
        vectors = torch.zeros(4, tokens, dtype=dtype, device=device)
        clipped = torch.zeros(tokens, dtype=torch.bool, device=device)
        return cls(vectors.new_zeros(()), vectors[0], vectors[1], vectors[2], clipped, vectors[3] if sign_norms else None)

    def astuple(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, slots=True)
class HeadOptions:
    """How the head computes, the same for every micro-batch of a run.

    temperature: log-probs are of the softmax over logits / temperature. chunk: tokens whose logits live at once; None sizes it by
    the shard. fp8: the logits' product in e4m3. kernels: Triton row kernels or torch operations; auto takes Triton on CUDA.
    """

    temperature: float = 1.0
    chunk: int | None = None
    fp8: bool = False
    kernels: Literal["auto", "torch", "triton"] = "auto"


def _part(values: Tensor | None, rows: slice | Tensor) -> Tensor | None:
    return None if values is None else values[rows]
