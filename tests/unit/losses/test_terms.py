"""The per-token loss by numbers worked out by hand, and its closed-form gradient against autograd."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nsr.losses.terms import LossTerms, TokenInputs, TokenTerms, token_terms
from tests.unit.losses.cases import ALL_TERMS, loss_terms


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def one_token(terms: LossTerms, weight: float, logprob: float, *, entropy: float = 0.7, scale: float = 1.0, **known: float) -> TokenTerms:
    tokens = TokenInputs(tensor(weight), tensor(scale), **{name: tensor(value) for name, value in known.items()})
    return token_terms(tensor(logprob), tensor(entropy), tokens, terms)


@pytest.mark.parametrize(
    ("weight", "ratio", "flows"),
    [(1.0, 1.1, True), (1.0, 1.3, False), (1.0, 0.5, True), (-1.0, 0.9, True), (-1.0, 0.7, False), (-1.0, 2.0, True)],
)
def test_each_sign_is_stopped_by_its_own_bound_alone(weight: float, ratio: float, flows: bool) -> None:
    token = one_token(LossTerms(eps_low=0.2, eps_high=0.2), weight, -1.0 + math.log(ratio), old_logprobs=-1.0)
    assert token.grad_logprob.item() == pytest.approx(-weight * ratio if flows else 0.0, rel=1e-12)
    assert token.loss.item() == pytest.approx(-weight * (ratio if flows else 1.0 + 0.2 * weight), rel=1e-12)
    assert token.clipped.item() is (not flows)


@pytest.mark.parametrize(("weight", "moved", "kept"), [(1.0, "eps_high", "eps_low"), (-1.0, "eps_low", "eps_high")])
def test_a_bound_acts_on_one_sign_only(weight: float, moved: str, kept: str) -> None:
    ratios = torch.linspace(0.3, 1.9, 33).double()
    tokens = TokenInputs(torch.full_like(ratios, weight), torch.ones_like(ratios), torch.full_like(ratios, -2.0))

    def loss(**bounds: float) -> torch.Tensor:
        return token_terms(ratios.log() - 2, ratios, tokens, LossTerms(**bounds)).loss

    assert torch.equal(loss(**{kept: 0.1}), loss(**{kept: 0.6}))
    assert not torch.equal(loss(**{moved: 0.1}), loss(**{moved: 0.6}))


def test_on_policy_the_ratio_is_one_and_has_the_gradient_of_the_log_prob() -> None:
    token = one_token(LossTerms(), -0.5, -3.0, scale=0.25)
    assert token.loss.item() == pytest.approx(0.125) and token.grad_logprob.item() == pytest.approx(0.125)
    assert not token.clipped.item()


@pytest.mark.parametrize(
    ("weight", "ratio", "loss", "gradient"),
    [(-2.0, 3.0, 3.0, 0.0), (-2.0, 1.4, 2.8, 2.8), (-2.0, 0.5, 1.6, 0.0), (2.0, 0.1, -0.2, -0.2), (2.0, 3.0, -2.4, 0.0)],
)
def test_dual_clip_bounds_what_a_negative_weight_can_lose(weight: float, ratio: float, loss: float, gradient: float) -> None:
    token = one_token(LossTerms(dual_clip=1.5), weight, math.log(ratio) - 1, old_logprobs=-1.0)
    assert token.loss.item() == pytest.approx(loss, rel=1e-12)
    assert token.grad_logprob.item() == pytest.approx(gradient, rel=1e-12)
    assert token.clipped.item() is (gradient == 0)


def test_a_negative_weights_loss_stays_finite_however_likely_the_token_became() -> None:
    token = one_token(LossTerms(), -1.0, -1.0, old_logprobs=-200.0)
    assert token.loss.item() == pytest.approx(math.exp(20.0))
    assert token.grad_logprob.item() == 0 and not token.clipped.item()


def test_reinforce_is_minus_the_weighted_log_prob() -> None:
    token = one_token(LossTerms("reinforce"), 2.0, -1.5, scale=0.5, old_logprobs=-9.0)
    assert token.loss.item() == 1.5 and token.grad_logprob.item() == -1.0 and not token.clipped.item()


def test_probability_is_the_papers_equation_6() -> None:
    token = one_token(LossTerms("probability"), -1.0, math.log(0.25), old_logprobs=-9.0)
    assert token.loss.item() == pytest.approx(0.25) and token.grad_logprob.item() == pytest.approx(0.25)
    assert one_token(LossTerms("probability"), 1.0, math.log(0.25)).loss.item() == pytest.approx(-0.25)


@pytest.mark.parametrize("weight", [0.0, 1.0, -3.0])
def test_k3_is_not_multiplied_by_the_weight(weight: float) -> None:
    known = {"old_logprobs": -1.0, "reference_logprobs": -1.0 + math.log(2)}
    with_kl, without = (one_token(LossTerms(kl_coefficient=coefficient), weight, -1.0, scale=0.5, **known) for coefficient in (0.1, 0.0))
    # d = ln 2: e^d - d - 1 = 1 - ln 2, and its derivative by the log-prob is -(e^d - 1) = -1.
    assert (with_kl.loss - without.loss).item() == pytest.approx(0.1 * 0.5 * (1 - math.log(2)), rel=1e-12)
    assert (with_kl.grad_logprob - without.grad_logprob).item() == pytest.approx(-0.1 * 0.5, rel=1e-12)


def test_k3_is_finite_and_without_a_gradient_far_from_the_reference() -> None:
    token = one_token(LossTerms(kl_coefficient=1.0), 0.0, -300.0, reference_logprobs=-1.0)
    assert token.loss.item() == pytest.approx(math.exp(20.0) - 21.0) and token.grad_logprob.item() == 0


@pytest.mark.parametrize(("ratio", "factor"), [(1.1, 1.1), (1.5, 1.2), (0.5, 0.5), (1e12, 1.2)])
@pytest.mark.parametrize("form", ["clipped", "reinforce", "probability"])
def test_the_correction_multiplies_the_weight_by_a_capped_ratio(form: str, ratio: float, factor: float) -> None:
    known = {"old_logprobs": -1.0, "rollout_logprobs": -1.0 - math.log(ratio)}
    corrected = one_token(LossTerms(form, correction_cap=1.2), -2.0, -1.1, **known)
    plain = one_token(LossTerms(form), -2.0 * factor, -1.1, **known)
    for got, want in ((corrected.loss, plain.loss), (corrected.grad_logprob, plain.grad_logprob)):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_the_correction_on_policy_takes_the_current_log_prob_for_the_old_one() -> None:
    token = one_token(LossTerms("reinforce", correction_cap=10.0), 1.0, -2.0, rollout_logprobs=-2.0 - math.log(3))
    assert token.grad_logprob.item() == pytest.approx(-3.0, rel=1e-12)


@pytest.mark.parametrize("weight", [0.0, 1.0, -3.0])
def test_the_entropy_bonus_is_not_multiplied_by_the_weight(weight: float) -> None:
    with_bonus, without = (one_token(LossTerms(entropy_coefficient=c), weight, -1.0, entropy=0.8, scale=0.5) for c in (0.1, 0.0))
    assert (with_bonus.loss - without.loss).item() == pytest.approx(-0.1 * 0.8 * 0.5, rel=1e-12)
    assert with_bonus.grad_entropy is not None and with_bonus.grad_entropy.item() == pytest.approx(-0.05, rel=1e-12)
    assert without.grad_entropy is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scale_zero_masks_whatever_the_token_holds(bad: float) -> None:
    known = {"old_logprobs": bad, "reference_logprobs": bad, "rollout_logprobs": bad}
    token = one_token(ALL_TERMS, bad, bad, entropy=bad, scale=0.0, **known)
    assert token.loss.item() == 0 and token.grad_logprob.item() == 0 and not token.clipped.item()
    assert token.grad_entropy is not None and token.grad_entropy.item() == 0


def test_a_weight_of_zero_is_never_clipped() -> None:
    assert not one_token(LossTerms(), 0.0, 0.0, old_logprobs=-3.0).clipped.item()


@settings(max_examples=150)
@given(seed=st.integers(0, 10_000), terms=loss_terms())
def test_the_closed_form_gradient_is_the_loss_functions(seed: int, terms: LossTerms) -> None:
    generator = torch.Generator().manual_seed(seed)
    logprobs, entropy, old, reference, rollout, weights = torch.randn(6, 40, generator=generator).double() - 1
    logprobs, entropy = logprobs.requires_grad_(), entropy.requires_grad_()
    tokens = TokenInputs(weights + 1, torch.rand(40, generator=generator).double(), old, reference, rollout)
    token = token_terms(logprobs, entropy, tokens, terms)
    want = torch.autograd.grad(token.loss.sum(), (logprobs, entropy), allow_unused=True)
    torch.testing.assert_close(token.grad_logprob.detach(), want[0], rtol=1e-12, atol=1e-14)
    assert (token.grad_entropy is None) == (want[1] is None) == (terms.entropy_coefficient == 0)
    if token.grad_entropy is not None:
        torch.testing.assert_close(token.grad_entropy, want[1], rtol=1e-12, atol=0)
    if terms.form == "clipped":
        signed = token_terms(logprobs, entropy, tokens, replace(terms, kl_coefficient=0.0))
        assert torch.equal(token.clipped, torch.autograd.grad(signed.loss.sum(), logprobs)[0] == 0)


def test_an_unknown_form_is_refused() -> None:
    terms = LossTerms()
    object.__setattr__(terms, "form", "clip")  # past the checker of types that tests run under
    with pytest.raises(ValueError, match="form='clip' is none of clipped, reinforce, probability"):
        terms.__post_init__()
