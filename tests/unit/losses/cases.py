"""Random micro-batches for the head, the head's and the reference's gradients of them, and strategies that draw both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from megatron_nsr.losses.head_tensors import HeadInputs, HeadOptions, HeadOutputs
from megatron_nsr.losses.policy_head import policy_head
from megatron_nsr.losses.reference import reference_loss
from megatron_nsr.losses.shard import VocabularyShard
from megatron_nsr.losses.terms import LossTerms

ALL_TERMS = LossTerms("clipped", 0.2, 0.28, dual_clip=1.5, entropy_coefficient=0.05, kl_coefficient=0.1, correction_cap=1.2)


@dataclass(frozen=True)
class Case:
    """hidden [tokens, hidden] and weight [vocab, hidden] require gradients; the whole vocabulary is on this rank."""

    hidden: Tensor
    weight: Tensor
    inputs: HeadInputs
    temperature: float = 1.0

    def with_inputs(self, **fields: Any) -> Case:
        return replace(self, inputs=replace(self.inputs, **fields))

    def run(self, terms: LossTerms, *, chunk: int = 5, **options: Any) -> HeadOutputs:
        shard = VocabularyShard(0, len(self.weight))
        return policy_head(self.hidden, self.weight, self.inputs, shard, terms, HeadOptions(self.temperature, chunk, **options))

    def exact(self) -> Case:
        """The same numbers in float64."""
        return replace(self, hidden=leaf(self.hidden.double()), weight=leaf(self.weight.double()))


def leaf(values: Tensor) -> Tensor:
    return values.detach().clone().requires_grad_()


def random_case(
    seed: int = 0,
    *,
    tokens: int = 23,
    vocab: int = 37,
    hidden: int = 8,
    dtype: torch.dtype = torch.float64,
    temperature: float = 1.0,
    on_policy: bool = False,
    response_rows: bool = False,
    **fields: Any,
) -> Case:
    """Weights of both signs, a third of the tokens masked, every optional tensor given; `fields` replace those of HeadInputs."""
    generator = torch.Generator().manual_seed(seed)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    states, weight = (torch.randn(rows, hidden, generator=generator).to(dtype) for rows in (tokens, vocab))
    targets = torch.randint(vocab, (tokens,), generator=generator)
    logprobs = torch.log_softmax(states.double() @ weight.double().t() / temperature, -1).gather(1, targets[:, None])[:, 0]
    drift = 0.3 * torch.randn(3, tokens, generator=generator)
    scale = torch.rand(tokens, generator=generator) * (torch.rand(tokens, generator=generator) > 0.3)
    inputs = HeadInputs(
        targets,
        torch.randn(tokens, generator=generator).to(precise),
        scale.to(precise),
        None if on_policy else (logprobs + drift[0]).to(precise),
        (logprobs + drift[1]).to(precise),
        (logprobs + drift[2]).to(precise),
        rows=scale.nonzero()[:, 0] if response_rows else None,
    )
    return Case(leaf(states), leaf(weight), replace(inputs, **fields), temperature)


def gradients(loss: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """(d_hidden, d_weight) in float64, of a loss whose own gradient is the case's loss_gradient."""
    d_hidden, d_weight = torch.autograd.grad(loss * case.inputs.loss_gradient, (case.hidden, case.weight))
    return d_hidden.double(), d_weight.double()


def head_gradients(case: Case, terms: LossTerms, **options: Any) -> tuple[Tensor, Tensor]:
    return gradients(case.run(terms, **options).loss, case)


def reference_gradients(case: Case, terms: LossTerms) -> tuple[Tensor, Tensor]:
    exact = case.exact()
    return gradients(reference_loss(exact.hidden, exact.weight, exact.inputs, terms, exact.temperature)["loss"], exact)


def reference_input_grad_sq(case: Case, terms: LossTerms) -> Tensor:
    """Squared norm of each token's gradient of the loss without the entropy bonus and without the micro-batch's factors."""
    main = case.exact().with_inputs(gradient_scale=1.0, loss_gradient=1.0)
    return reference_gradients(main, replace(terms, entropy_coefficient=0.0))[0].square().sum(-1)


def relative_error(got: Tensor, want: Tensor) -> float:
    """The largest error over the largest value."""
    if got.numel() == 0:
        return 0.0
    return float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-30))


def loss_terms() -> st.SearchStrategy[LossTerms]:
    """Every term and every combination of terms."""
    return st.builds(
        LossTerms,
        form=st.sampled_from(["clipped", "reinforce", "probability"]),
        eps_low=st.sampled_from([0.1, 0.2]),
        eps_high=st.sampled_from([0.2, 0.28]),
        dual_clip=st.sampled_from([None, 1.5]),
        entropy_coefficient=st.sampled_from([0.0, 0.05]),
        kl_coefficient=st.sampled_from([0.0, 0.1]),
        correction_cap=st.sampled_from([None, 1.2]),
    )


def cases(**fixed: Any) -> st.SearchStrategy[Case]:
    """Micro-batches of any size from one token and one word up."""
    drawn = {
        "seed": st.integers(0, 10_000),
        "tokens": st.integers(1, 20),
        "vocab": st.integers(1, 41),
        "temperature": st.sampled_from([1.0, 0.7, 1.3]),
        "on_policy": st.booleans(),
        "response_rows": st.booleans(),
        "gradient_scale": st.sampled_from([1.0, 1.7]),
        "loss_gradient": st.sampled_from([1.0, 0.5]),
    }
    return st.builds(random_case, **{name: strategy for name, strategy in drawn.items() if name not in fixed}, **_just(fixed))


def _just(fixed: dict[str, Any]) -> dict[str, st.SearchStrategy[Any]]:
    return {name: st.just(value) for name, value in fixed.items()}
