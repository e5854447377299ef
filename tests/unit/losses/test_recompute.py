"""An objective's own loss: log-prob and entropy as tensors with gradients, through the same head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_nsr.losses.head_tensors import HeadOptions
from megatron_nsr.losses.policy_head import policy_head
from megatron_nsr.losses.recompute import LinearLogprob
from megatron_nsr.losses.shard import VocabularyShard
from megatron_nsr.losses.terms import LossTerms
from tests.unit.losses.cases import ALL_TERMS, Case, cases, gradients, head_gradients, leaf, random_case


def clipped_loss(case: Case, terms: LossTerms) -> Callable[[Tensor, Tensor], Tensor]:
    """The built-in clipped loss as a user would write it."""
    weights, old = case.inputs.weights, case.inputs.old_logprobs
    assert weights is not None

    def own(logprobs: Tensor, _: Tensor) -> Tensor:
        ratio = (logprobs - (logprobs.detach() if old is None else old)).exp()
        bounded = ratio.clamp(1 - terms.eps_low, 1 + terms.eps_high)
        return -torch.minimum(ratio * weights, bounded * weights)

    return own


@settings(max_examples=80)
@given(
    case=cases(loss_gradient=1.0),
    entropy=st.sampled_from([0.0, 0.05]),
    kl=st.sampled_from([0.0, 0.1]),
    chunk=st.integers(1, 9),
)
def test_the_built_in_loss_as_an_own_one_gives_its_gradients(case: Case, entropy: float, kl: float, chunk: int) -> None:
    terms = LossTerms(entropy_coefficient=entropy, kl_coefficient=kl)
    built_in = case.run(terms, chunk=chunk)
    own = case.with_inputs(own_loss=clipped_loss(case, terms)).run(terms, chunk=chunk)
    for name in ("loss", "logprobs", "entropy", "token_loss"):
        torch.testing.assert_close(getattr(own, name), getattr(built_in, name), rtol=1e-11, atol=1e-12, msg=name)
    for got, want in zip(gradients(own.loss, case), gradients(built_in.loss, case), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_an_own_loss_may_use_the_entropy_and_mix_tokens() -> None:
    case = random_case(2, tokens=9)

    def own(logprobs: Tensor, entropy: Tensor) -> Tensor:
        return entropy.square() * logprobs + logprobs.mean()

    exact = torch.log_softmax(case.hidden @ case.weight.t(), -1)
    logprobs, entropy = exact.gather(1, case.inputs.targets[:, None])[:, 0], -(exact.exp() * exact).sum(-1)
    want = torch.autograd.grad((case.inputs.scale * own(logprobs, entropy)).sum(), (case.hidden, case.weight))
    torch.testing.assert_close(head_gradients(case.with_inputs(own_loss=own), LossTerms()), want, rtol=1e-11, atol=1e-12)


def test_an_own_loss_may_be_scaled_and_differentiated_again() -> None:
    """Its gradient is formed in the backward pass: none of the built-in loss's limits hold."""
    case = random_case(3, own_loss=lambda logprobs, entropy: -logprobs)
    once = gradients(case.run(LossTerms()).loss, case)
    loss = 2 * case.run(LossTerms()).loss
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close((case.hidden.grad, case.weight.grad), (4 * once[0], 4 * once[1]))


def test_an_own_loss_has_neither_clip_flags_nor_norms() -> None:
    output = random_case(4, own_loss=lambda logprobs, entropy: -logprobs, sign_norms=True).run(LossTerms())
    assert output.clipped is None and output.input_grad_sq is None


@pytest.mark.parametrize("reduce", [torch.sum, torch.mean, lambda losses: losses[:, None]])
def test_an_own_loss_that_is_not_one_number_a_token_is_refused(reduce: Callable[[Tensor], Tensor]) -> None:
    """It would be broadcast over the tokens: another loss, silently."""
    case = random_case(4, own_loss=lambda logprobs, entropy: reduce(-logprobs))
    with pytest.raises(ValueError, match=r"token_loss gave a tensor of shape \(.*\), not one loss a token"):
        case.run(LossTerms())


def test_scale_masks_what_an_own_loss_makes_of_a_token() -> None:
    case = random_case(5)
    kept = case.inputs.scale > 0
    wild = case.with_inputs(own_loss=lambda logprobs, entropy: -logprobs + torch.where(kept, 0.0, torch.inf))
    plain = case.with_inputs(own_loss=lambda logprobs, entropy: -logprobs)
    assert not kept.all() and wild.run(LossTerms()).token_loss.isfinite().all()
    for got, want in zip(head_gradients(wild, LossTerms()), head_gradients(plain, LossTerms()), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("terms", [LossTerms(kl_coefficient=0.1), LossTerms(correction_cap=2.0)])
def test_an_own_loss_needs_the_terms_tensors_too(terms: LossTerms) -> None:
    case = random_case(6, own_loss=lambda logprobs, entropy: -logprobs, reference_logprobs=None, rollout_logprobs=None)
    with pytest.raises(ValueError, match="needs r"):
        case.run(terms)


def test_log_prob_and_entropy_have_autograds_gradient() -> None:
    states, weight = (leaf(torch.randn(rows, 5, generator=torch.Generator().manual_seed(rows)).double()) for rows in (4, 7))
    targets, rows, shard = torch.tensor([0, 6, 2, 2]), torch.tensor([0, 1, 3]), VocabularyShard(0, 7)

    def both(states: Tensor, weight: Tensor) -> Any:
        return LinearLogprob.apply(states, weight, targets, rows, shard, HeadOptions(0.8, 2))

    assert torch.autograd.gradcheck(both, (states, weight))


@pytest.mark.parametrize("padding", [0, 4])
def test_padding_rows_get_no_gradient(padding: int) -> None:
    case = random_case(7, vocab=10, own_loss=lambda logprobs, entropy: -logprobs)
    padded = replace(case, weight=leaf(torch.nn.functional.pad(case.weight, (0, 0, 0, padding), value=50.0)))
    loss = policy_head(padded.hidden, padded.weight, padded.inputs, VocabularyShard(0, 10), ALL_TERMS).loss
    d_hidden, d_weight = gradients(loss, padded)
    want = head_gradients(case, ALL_TERMS)
    torch.testing.assert_close((d_hidden, d_weight[:10]), want, rtol=1e-11, atol=1e-12)
    assert not d_weight[10:].any()
