"""The head against plain float64 autograd over the whole vocabulary."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nsr.losses.policy_head import HeadInputs, policy_head
from megatron_nsr.losses.reference import reference_loss
from megatron_nsr.losses.shard import VocabularyShard
from megatron_nsr.losses.terms import LossTerms
from tests.unit.losses.cases import (
    ALL_TERMS,
    Case,
    cases,
    gradients,
    head_gradients,
    leaf,
    loss_terms,
    random_case,
    reference_gradients,
    relative_error,
)

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


@settings(max_examples=200)
@given(case=cases(), terms=loss_terms(), chunk=st.integers(1, 9))
def test_loss_and_gradients_equal_the_reference(case: Case, terms: LossTerms, chunk: int) -> None:
    output = case.run(terms, chunk=chunk)
    expected = reference_loss(case.hidden, case.weight, case.inputs, terms, case.temperature)
    looked_at = torch.ones(len(output.logprobs), dtype=torch.bool) if case.inputs.rows is None else case.inputs.scale > 0
    torch.testing.assert_close(output.loss.detach(), expected["loss"].detach(), rtol=1e-11, atol=1e-11)
    for name, got in {"logprobs": output.logprobs, "entropy": output.entropy, "losses": output.token_loss}.items():
        want = torch.where(looked_at, expected[name].detach(), torch.zeros(()).double())
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    for got, want in zip(gradients(output.loss, case), gradients(expected["loss"], case), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), terms=loss_terms(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_fp32_and_bf16_inputs_give_the_gradient_of_their_values(seed: int, terms: LossTerms, dtype: torch.dtype) -> None:
    terms = replace(terms, eps_low=0.9, eps_high=9.0, dual_clip=None)  # rounding may not move a token over a bound
    case = random_case(seed, dtype=dtype)
    assert case.run(terms).logprobs.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8  # the gradient itself is rounded to the inputs' dtype
    for got, want in zip(head_gradients(case, terms), reference_gradients(case, terms), strict=True):
        assert relative_error(got, want) < tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("coefficient", [0.0, 0.01])
def test_gradients_of_psr_and_nsr_add_up_to_reinforce(dtype: torch.dtype, coefficient: float) -> None:
    """g_PSR + g_NSR = g_REINFORCE at equal parameters, clipping included and entropy counted once."""
    case = random_case(5, tokens=40, vocab=23, dtype=dtype)
    signs, scale, terms = case.inputs.weights.sign(), case.inputs.scale, LossTerms(entropy_coefficient=coefficient)

    def gradient(kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return head_gradients(case.with_inputs(weights=signs * kept, scale=scale * kept), terms)

    clipped = case.with_inputs(weights=signs).run(terms).clipped
    assert (clipped & (signs > 0)).any() and (clipped & (signs < 0)).any() and not clipped.all()
    for psr, nsr, whole in zip(gradient(signs > 0), gradient(signs < 0), gradient(signs != 0), strict=True):
        assert (psr + nsr - whole).norm() <= TOLERANCES[dtype] * whole.norm()


def test_all_weights_zero_leave_the_regularizers_only() -> None:
    case = random_case(1, weights=torch.zeros(23).double())
    output = case.run(LossTerms())
    assert output.loss.item() == 0.0 and not output.clipped.any()
    assert all(bool((gradient == 0).all()) for gradient in gradients(output.loss, case))
    for got, want in zip(head_gradients(case, ALL_TERMS), reference_gradients(case, ALL_TERMS), strict=True):
        assert relative_error(got, want) < 1e-12 and bool((want != 0).any())


def test_clip_flags_mark_the_tokens_without_a_gradient() -> None:
    case = random_case(2, scale=torch.ones(23).double())
    output = case.run(LossTerms())
    d_hidden, _ = gradients(output.loss, case)
    assert 0 < output.clipped.sum() < 23
    assert torch.equal(output.clipped, (d_hidden == 0).all(-1))


@settings(max_examples=40)
@given(case=cases(response_rows=False), terms=loss_terms(), chunk=st.integers(1, 9), own=st.booleans())
def test_rows_equal_masking_by_scale_with_zeros_elsewhere(case: Case, terms: LossTerms, chunk: int, own: bool) -> None:
    if own:
        case = case.with_inputs(own_loss=lambda logprobs, entropy: -logprobs.exp() - 0.1 * entropy.square())
    masked, kept = case.run(terms, chunk=chunk), case.inputs.scale > 0
    selected = case.with_inputs(rows=kept.nonzero()[:, 0]).run(terms, chunk=chunk)
    torch.testing.assert_close(selected.loss, masked.loss, rtol=1e-12, atol=1e-12)
    for name in ("logprobs", "entropy", "token_loss"):
        torch.testing.assert_close(getattr(selected, name), getattr(masked, name) * kept, rtol=1e-11, atol=1e-12, msg=name)
    assert own or torch.equal(selected.clipped, masked.clipped)
    for got, want in zip(gradients(selected.loss, case), gradients(masked.loss, case), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    assert bool((gradients(case.run(terms).loss, case)[0][~kept] == 0).all())


@pytest.mark.parametrize("own_loss", [None, lambda logprobs, entropy: -logprobs])
def test_no_rows_at_all_are_a_loss_of_zero_with_zero_gradients(own_loss) -> None:
    case = random_case(3, rows=torch.zeros(0, dtype=torch.int64), own_loss=own_loss)
    output = case.run(ALL_TERMS)
    assert output.loss.item() == 0.0 and not output.logprobs.any() and not output.token_loss.any()
    assert all(not gradient.any() for gradient in gradients(output.loss, case))


def test_without_weights_it_only_measures() -> None:
    case = random_case(1)
    trained = case.run(LossTerms())
    case.weight.main_grad = torch.zeros_like(case.weight)
    output = case.with_inputs(weights=None, scale=None).run(LossTerms())
    assert not output.loss.requires_grad and not output.logprobs.requires_grad
    assert output.loss.item() == 0.0 and not output.token_loss.any() and output.input_grad_sq is None
    torch.testing.assert_close(output.logprobs, trained.logprobs, rtol=0, atol=0)
    torch.testing.assert_close(output.entropy, trained.entropy, rtol=0, atol=0)
    assert not case.weight.main_grad.any()


@pytest.mark.parametrize("trains", [True, False])
def test_unmeasured_entropy_is_zero_and_changes_nothing_else(trains: bool) -> None:
    case = random_case(4) if trains else random_case(4, weights=None, scale=None)
    measured, output = case.run(LossTerms()), case.with_inputs(measure_entropy=False).run(LossTerms())
    assert measured.entropy.all() and not output.entropy.any()
    assert torch.equal(output.logprobs, measured.logprobs) and torch.equal(output.token_loss, measured.token_loss)


def test_an_entropy_bonus_measures_entropy_whether_asked_or_not() -> None:
    case = random_case(4)
    asked, output = case.run(ALL_TERMS), case.with_inputs(measure_entropy=False).run(ALL_TERMS)
    assert torch.equal(output.entropy, asked.entropy) and torch.equal(output.loss, asked.loss)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_same_input_gives_the_same_bits(dtype: torch.dtype) -> None:
    case = random_case(6, tokens=70, vocab=301, dtype=dtype, sign_norms=True)
    runs = []
    for _ in range(2):
        output = case.run(ALL_TERMS, chunk=16)
        runs.append([*output.astuple(), *gradients(output.loss, case)])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_padded_vocabulary_rows_have_no_probability_and_no_gradient() -> None:
    case = random_case(2, vocab=10)
    padded = leaf(torch.cat([case.weight, torch.full((3, 8), 50.0, dtype=torch.float64)]))
    plain = case.run(ALL_TERMS)
    output = policy_head(case.hidden, padded, case.inputs, VocabularyShard(0, 10), ALL_TERMS)
    torch.testing.assert_close(output.logprobs, plain.logprobs)
    (gradient,) = torch.autograd.grad(output.loss, padded)
    torch.testing.assert_close(gradient[:10], gradients(plain.loss, case)[1])
    assert not gradient[10:].any()


def test_gradients_of_micro_batches_add_up_to_those_of_the_whole() -> None:
    case = random_case(7, tokens=20)
    whole = head_gradients(case, ALL_TERMS)
    fields = ("targets", "weights", "scale", "old_logprobs", "reference_logprobs", "rollout_logprobs")
    for rows in (slice(0, 3), slice(3, 20)):
        parts = {name: getattr(case.inputs, name)[rows] for name in fields}
        part = Case(case.hidden[rows], case.weight, HeadInputs(**parts))
        part.run(ALL_TERMS).loss.backward()
    torch.testing.assert_close((case.hidden.grad, case.weight.grad), whole, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("own_loss", [None, lambda logprobs, entropy: -logprobs])
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_the_other_sides_gradient_is_the_same_beside_a_frozen_one(frozen: str, own_loss) -> None:
    case = random_case(8, own_loss=own_loss)
    whole = dict(zip(("hidden", "weight"), gradients(case.run(ALL_TERMS).loss, case), strict=True))
    half = replace(case, **{frozen: getattr(case, frozen).detach()})
    half.run(ALL_TERMS).loss.backward()
    trained = "weight" if frozen == "hidden" else "hidden"
    torch.testing.assert_close(getattr(half, trained).grad, whole[trained], rtol=0, atol=0)
    assert getattr(half, frozen).grad is None


def test_hidden_states_may_feed_a_value_head_too() -> None:
    case, values = random_case(9), leaf(torch.randn(8, 1, generator=torch.Generator().manual_seed(1)).double())
    returns = torch.linspace(-1, 1, 23).double()

    def total(policy_loss: torch.Tensor) -> torch.Tensor:
        return policy_loss + 0.5 * ((case.hidden @ values)[:, 0] - returns).square().mean()

    got, want = total(case.run(ALL_TERMS).loss), total(reference_loss(case.hidden, case.weight, case.inputs, ALL_TERMS)["loss"])
    inputs = (case.hidden, case.weight, values)
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("expected", "brought"), [(1.0, 0.5), (0.25, 1.0), (1.0, 0.0), (1.0, math.nan)])
def test_a_backward_pass_with_another_gradient_is_an_error(expected: float, brought: float) -> None:
    case = random_case(10, loss_gradient=expected)
    loss = case.run(LossTerms()).loss
    with pytest.raises(RuntimeError, match=rf"not loss_gradient={expected}, with which the policy head formed"):
        (loss * brought).backward()


def test_loss_gradient_may_differ_by_rounding() -> None:
    case = random_case(10, dtype=torch.float32, loss_gradient=1000 / 147)
    loss = case.run(LossTerms()).loss
    brought: list[torch.Tensor] = []
    loss.register_hook(brought.append)
    (loss / 49 / 3 * 1000).backward()
    assert brought[0] != 1000 / 147 and brought[0].item() == pytest.approx(1000 / 147)
    assert bool(case.weight.grad.any())


def test_a_second_backward_pass_is_an_error() -> None:
    loss = random_case(11).run(LossTerms()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be taken once only"):
        loss.backward()


@pytest.mark.parametrize(
    ("terms", "missing", "message"),
    [
        (LossTerms(kl_coefficient=0.25), "reference_logprobs", r"kl_coefficient=0\.25 needs reference_logprobs"),
        (LossTerms(correction_cap=2.0), "rollout_logprobs", r"correction_cap=2\.0 needs rollout_logprobs"),
    ],
)
def test_a_term_without_its_tensor_is_named(terms: LossTerms, missing: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_case(12, **{missing: None}).run(terms)


@pytest.mark.parametrize("missing", ["weights", "scale"])
def test_weights_and_scale_come_together(missing: str) -> None:
    with pytest.raises(ValueError, match="give weights and scale together"):
        random_case(12, **{missing: None})


def test_other_numbers_of_tokens_than_hidden_states_are_refused() -> None:
    """One number beside many states would be broadcast silently."""
    case = random_case(11, tokens=6)
    with pytest.raises(ValueError, match=r"targets has shape \(6,\) beside 5 hidden states"):
        policy_head(case.hidden[:5], case.weight, case.inputs, VocabularyShard(0, len(case.weight)), LossTerms())


def test_hidden_states_and_weight_of_two_types_are_refused() -> None:
    case = random_case(12, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"hidden is torch.float32, weight torch.bfloat16"):
        policy_head(case.hidden, case.weight.bfloat16(), case.inputs, VocabularyShard(0, len(case.weight)), LossTerms())


def test_an_own_loss_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="own_loss without weights and scale"):
        random_case(13, weights=None, scale=None, own_loss=lambda logprobs, entropy: -logprobs)
