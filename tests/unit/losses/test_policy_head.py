"""The head against plain float64 autograd over the whole vocabulary."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nsr.losses.linear_logprob import VocabularyShard
from megatron_nsr.losses.policy_head import HeadInputs, policy_head
from megatron_nsr.losses.reference import reference_loss
from megatron_nsr.losses.terms import LossTerms, clipped_policy_loss


def random_case(seed: int, tokens: int, vocab: int, hidden: int = 8, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(tokens, hidden, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, hidden, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    weights = torch.randn(tokens, generator=generator).double()
    scale = torch.rand(tokens, generator=generator).double() * (torch.rand(tokens, generator=generator) > 0.3)
    logprobs = torch.log_softmax((states @ weight.t()).double(), -1).gather(1, targets[:, None])[:, 0].detach()
    old = logprobs + 0.3 * torch.randn(tokens, generator=generator)
    return states, weight, HeadInputs(targets, weights, scale, old, gradient_scale=1.7)


def gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return [gradient.double() for gradient in torch.autograd.grad(loss, inputs)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 20),
    vocab=st.integers(2, 37),
    chunk=st.integers(1, 9),
    entropy=st.sampled_from([0.0, 0.05]),
    temperature=st.sampled_from([1.0, 0.6, 1.3]),
    on_policy=st.booleans(),
)
def test_loss_and_gradients_equal_the_reference(seed, tokens, vocab, chunk, entropy, temperature, on_policy) -> None:
    states, weight, inputs = random_case(seed, tokens, vocab)
    if on_policy:
        inputs = HeadInputs(inputs.targets, inputs.weights, inputs.scale, None, inputs.gradient_scale)
    terms = LossTerms(0.2, 0.28, entropy)
    output = policy_head(states, weight, inputs, VocabularyShard(0, vocab), terms, temperature=temperature, chunk=chunk)
    expected = reference_loss(states, weight, inputs, terms, temperature)
    assert output.loss.item() == pytest.approx(expected["loss"].item(), rel=1e-12, abs=1e-12)
    torch.testing.assert_close(output.logprobs, expected["logprobs"].detach(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(output.entropy, expected["entropy"].detach(), rtol=1e-10, atol=1e-10)
    for got, want in zip(gradients(output.loss, states, weight), gradients(expected["loss"], states, weight), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_without_weights_it_only_measures() -> None:
    states, weight, inputs = random_case(1, 6, 11)
    output = policy_head(states, weight, HeadInputs(inputs.targets), VocabularyShard(0, 11), LossTerms())
    assert not output.loss.requires_grad and not output.logprobs.requires_grad
    assert output.loss.item() == 0.0
    assert bool((output.entropy > 0).all())


def test_padded_vocabulary_rows_have_no_probability_and_no_gradient() -> None:
    states, weight, inputs = random_case(2, 7, 10)
    padded = torch.cat([weight.detach(), torch.full((3, 8), 50.0, dtype=torch.float64)]).requires_grad_()
    terms = LossTerms(entropy_coefficient=0.01)
    plain = policy_head(states, weight, inputs, VocabularyShard(0, 10), terms)
    output = policy_head(states, padded, inputs, VocabularyShard(0, 10), terms)
    torch.testing.assert_close(output.logprobs, plain.logprobs)
    (gradient,) = torch.autograd.grad(output.loss, padded)
    assert gradient[10:].abs().max() == 0


def test_bf16_log_probs_are_not_rounded_to_bf16() -> None:
    states, weight, inputs = random_case(3, 64, 33, dtype=torch.bfloat16)
    output = policy_head(states, weight, HeadInputs(inputs.targets), VocabularyShard(0, 33), LossTerms())
    exact = torch.log_softmax(states.double() @ weight.double().t(), -1).gather(1, inputs.targets[:, None])[:, 0]
    assert (output.logprobs.double() - exact).abs().max() < 1e-4  # bf16 logits of this size would err by about 0.05


def test_a_common_offset_of_the_logits_costs_no_precision() -> None:
    states = torch.cat([torch.randn(5, 4), torch.ones(5, 1)], 1)
    weight = torch.cat([torch.randn(9, 4), torch.full((9, 1), 5000.0)], 1)
    targets = torch.arange(5)
    output = policy_head(states, weight, HeadInputs(targets), VocabularyShard(0, 9), LossTerms())
    exact = torch.log_softmax(states.double() @ weight.double().t(), -1)
    tolerance = 4 * 5000 * torch.finfo(torch.float32).eps  # a few ulp of the largest logit
    assert (output.logprobs - exact.gather(1, targets[:, None])[:, 0]).abs().max() < tolerance
    assert (output.entropy - -(exact.exp() * exact).sum(-1)).abs().max() < tolerance


@pytest.mark.parametrize(
    ("weight", "ratio", "flows"),
    [(1.0, 1.1, True), (1.0, 1.3, False), (1.0, 0.5, True), (-1.0, 0.9, True), (-1.0, 0.7, False), (-1.0, 2.0, True)],
)
def test_each_sign_is_stopped_by_its_own_bound_alone(weight: float, ratio: float, flows: bool) -> None:
    logprob = torch.tensor([-1.0 + math.log(ratio)], dtype=torch.float64, requires_grad=True)
    loss, clipped = clipped_policy_loss(logprob, torch.tensor([-1.0]), torch.tensor([weight]), LossTerms(0.2, 0.2))
    (gradient,) = torch.autograd.grad(loss.sum(), logprob)
    assert gradient.item() == pytest.approx(-weight * ratio if flows else 0.0, rel=1e-6)
    assert clipped.item() is (not flows)


def test_a_negative_weights_loss_stays_finite_however_likely_the_token_became() -> None:
    logprob = torch.tensor([-1.0], requires_grad=True)
    loss, clipped = clipped_policy_loss(logprob, torch.tensor([-200.0]), torch.tensor([-1.0]), LossTerms())
    (gradient,) = torch.autograd.grad(loss.sum(), logprob)
    assert loss.item() == pytest.approx(math.exp(20.0)) and gradient.item() == 0 and not clipped.item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_of_psr_and_nsr_add_up_to_reinforce(dtype: torch.dtype) -> None:
    """g_PSR + g_NSR = g_REINFORCE at equal parameters, clipping included and entropy counted once."""
    states, weight, inputs = random_case(5, 40, 23)
    states, weight = states.detach().to(dtype).requires_grad_(), weight.detach().to(dtype).requires_grad_()
    signs, scale = inputs.weights.sign(), inputs.scale
    shard = VocabularyShard(0, 23)

    def gradient(weights: torch.Tensor, kept: torch.Tensor) -> list[torch.Tensor]:
        chosen = HeadInputs(inputs.targets, weights.to(dtype), (scale * kept).to(dtype), inputs.old_logprobs.to(dtype))
        return gradients(policy_head(states, weight, chosen, shard, LossTerms(0.2, 0.2, 0.01)).loss, states, weight)

    positive, negative = signs.clamp(min=0), signs.clamp(max=0)
    parts = zip(gradient(positive, signs > 0), gradient(negative, signs < 0), strict=True)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for (psr, nsr), whole in zip(parts, gradient(signs, signs != 0), strict=True):
        assert (psr + nsr - whole).norm() <= tolerance * whole.norm()
