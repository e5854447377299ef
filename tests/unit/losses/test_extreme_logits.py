"""Precision in fp32 and bf16, at logits of every size, against float64 with the same inputs.

A logit is known to half an ulp of the largest logit at best; that absolute error is a relative error of its probability.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_nsr.losses.head_tensors import HeadInputs
from megatron_nsr.losses.reference import reference_loss
from megatron_nsr.losses.terms import LossTerms, TokenInputs, token_terms
from tests.unit.losses.cases import Case, gradients, leaf, random_case, reference_gradients

VOCAB = 41
LAYOUTS = {"near -150": (-150.0, None), "near -150, one at 3e4": (-150.0, 3e4), "offset 5000": (5000.0, None), "offset -3e4": (-3e4, None)}
TERMS = {
    "clipped": LossTerms(),
    "clipped with entropy": LossTerms(entropy_coefficient=0.5),
    "reinforce with entropy": LossTerms("reinforce", entropy_coefficient=0.5),
    "probability": LossTerms("probability"),
    "k3": LossTerms("reinforce", kl_coefficient=0.5),
}


def extreme_case(layout: str) -> Case:
    """Logits of about `common`, and at one word `peak`; every fourth token's target is that word."""
    common, peak = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(1)
    offsets = torch.full((VOCAB, 1), common)
    targets = torch.randint(VOCAB, (16,), generator=generator)
    if peak is not None:
        offsets[VOCAB // 3], targets[::4] = peak, VOCAB // 3
    states = torch.cat([torch.randn(16, 7, generator=generator), torch.ones(16, 1)], 1)
    weight = torch.cat([torch.randn(VOCAB, 7, generator=generator), offsets], 1)
    logprobs = torch.log_softmax(states.double() @ weight.double().t(), -1).gather(1, targets[:, None])[:, 0]
    drift = torch.tensor([0.1, -0.1, 0.5, -0.5]).repeat(4)  # log-ratios that no rounding moves over a bound
    weights = torch.tensor([1.0, -1.0, -0.5]).repeat(6)[:16]
    inputs = HeadInputs(targets, weights, torch.full((16,), 0.25), (logprobs - drift).float(), (logprobs + drift).float())
    return Case(leaf(states), leaf(weight), inputs)


def ulp_of_largest_logit(case: Case) -> float:
    largest = float((case.hidden.detach().double() @ case.weight.detach().double().t()).abs().max())
    return 2.0 ** (math.floor(math.log2(largest)) - 23)


def gradient_bounds(case: Case, terms: LossTerms) -> tuple[Tensor, Tensor]:
    """What d_hidden and d_weight change by at most when every probability, ratio and log-prob changes by one part."""
    states, weight, inputs = case.hidden.detach().double(), case.weight.detach().double(), case.inputs
    log_p = torch.log_softmax(states @ weight.t(), -1)
    p, entropy = log_p.exp(), -(log_p.exp() * log_p).sum(-1)
    known = [x.double() for x in (inputs.weights, inputs.scale, inputs.old_logprobs, inputs.reference_logprobs) if x is not None]
    token = token_terms(log_p.gather(1, inputs.targets[:, None])[:, 0], entropy, TokenInputs(*known), terms)
    at_target = torch.nn.functional.one_hot(inputs.targets, VOCAB)
    magnitude = (token.grad_logprob.abs() + terms.kl_coefficient * inputs.scale)[:, None] * (at_target + p)
    if token.grad_entropy is not None:
        magnitude = magnitude + token.grad_entropy.abs()[:, None] * p * (2 + (log_p + entropy[:, None]).abs())
    return magnitude @ weight.abs(), magnitude.t() @ states.abs()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probs_and_entropy_err_by_a_few_ulp_of_the_largest_logit(layout: str) -> None:
    case = extreme_case(layout)
    output = case.run(LossTerms())
    expected = reference_loss(case.exact().hidden, case.exact().weight, case.inputs, LossTerms())
    tolerance = 3 * ulp_of_largest_logit(case)
    assert (output.logprobs - expected["logprobs"]).abs().max() < tolerance
    assert (output.entropy - expected["entropy"]).abs().max() < tolerance


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_err_by_a_few_ulp_of_the_largest_logit(layout: str, terms: str) -> None:
    case = extreme_case(layout)
    tolerance = 3 * ulp_of_largest_logit(case)
    got, want = gradients(case.run(TERMS[terms]).loss, case), reference_gradients(case, TERMS[terms])
    for a, b, bound in zip(got, want, gradient_bounds(case, TERMS[terms]), strict=True):
        assert bool((bound > 0).any()) and bool(((a - b).abs() <= tolerance * bound).all())


@pytest.mark.parametrize("offset", [5000.0, -5000.0])
def test_an_offset_exact_in_fp32_changes_nothing(offset: float) -> None:
    """Integer logits: the offset itself rounds nothing, so that what is left is the head's own arithmetic."""
    states = torch.cat([torch.randint(-3, 4, (12, 4), generator=torch.Generator().manual_seed(2)), torch.ones(12, 1)], 1).float()
    words = torch.randint(-2, 3, (VOCAB, 4), generator=torch.Generator().manual_seed(3)).float()
    inputs = random_case(3, tokens=12, vocab=VOCAB, dtype=torch.float32).inputs
    runs = []
    for shift in (0.0, offset):
        case = Case(leaf(states), leaf(torch.cat([words, torch.full((VOCAB, 1), shift)], 1)), inputs)
        output = case.run(LossTerms("reinforce", entropy_coefficient=0.1))
        runs.append((output.logprobs, output.entropy, gradients(output.loss, case)[1]))
    assert all(torch.equal(plain, shifted) for plain, shifted in zip(*runs, strict=True))


@pytest.mark.parametrize(("hidden", "vocab"), [(64, 997), (300, 211)])
def test_bf16_log_probs_err_no_more_than_materialized_fp32_logits(hidden: int, vocab: int) -> None:
    case = random_case(3, tokens=256, vocab=vocab, hidden=hidden, dtype=torch.bfloat16)
    exact = reference_loss(case.exact().hidden, case.exact().weight, case.inputs, LossTerms())["logprobs"].detach()

    def error(logits: Tensor) -> float:
        return float((torch.log_softmax(logits, -1).gather(1, case.inputs.targets[:, None])[:, 0] - exact).square().mean().sqrt())

    logits = case.hidden.detach().float() @ case.weight.detach().float().t()
    got = float((case.run(LossTerms(), chunk=64).logprobs - exact).square().mean().sqrt())
    assert got <= 1.01 * error(logits)
    assert got < 1e-3 * error(logits.bfloat16().float())  # what logits rounded to bf16 would cost
