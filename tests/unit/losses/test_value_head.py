"""The critic's head against the published formula in float64 with autograd: loss, values, gradients, prompts left out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nsr.losses.value_head import ValueInputs, ValueOutputs, value_head, value_losses

TOKENS, HIDDEN, CLIP = 12, 6, 0.3


def leaf(values: torch.Tensor) -> torch.Tensor:
    return values.detach().clone().requires_grad_()


def case(seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, ValueInputs]:
    """Hidden states, weight and inputs; some values have left the clip range, to either side of their returns."""
    draw = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(rows, HIDDEN, generator=draw, dtype=torch.float64) for rows in (TOKENS, 1))
    values, returns, scale = (hidden @ weight.t())[:, 0], torch.randn(TOKENS, generator=draw), torch.rand(TOKENS, generator=draw)
    old = values.float() + 0.5 * torch.randn(TOKENS, generator=draw)
    rows = torch.randperm(TOKENS, generator=draw)[: int(torch.randint(0, TOKENS + 1, (), generator=draw))].sort().values
    inside = torch.zeros(TOKENS).index_fill(0, rows, 1.0)
    return leaf(hidden.to(dtype)), leaf(weight.to(dtype)), ValueInputs(rows, returns, old, scale * inside, CLIP, gradient_scale=3.0)


def reference(hidden: torch.Tensor, weight: torch.Tensor, inputs: ValueInputs) -> torch.Tensor:
    """As PPO's reference implementation has it, with materialised minima and maxima."""
    assert inputs.returns is not None and inputs.old_values is not None and inputs.scale is not None
    values, old, returns = (hidden @ weight.t())[:, 0], inputs.old_values.double(), inputs.returns.double()
    bounded = torch.maximum(torch.minimum(values, old + CLIP), old - CLIP)
    losses = 0.5 * torch.maximum((values - returns) ** 2, (bounded - returns) ** 2)
    return (losses * inputs.scale.double()).sum() * inputs.gradient_scale


@settings(deadline=None)  # the first call pays for what torch starts
@given(st.integers(0, 10_000))
def test_loss_and_gradients_are_the_formula_s(seed: int) -> None:
    hidden, weight, inputs = case(seed)
    found = value_head(hidden, weight, inputs)
    found.loss.backward()
    plain = leaf(hidden), leaf(weight)
    want = reference(*plain, inputs)
    want.backward()
    torch.testing.assert_close(found.loss, want)
    torch.testing.assert_close(hidden.grad, plain[0].grad)
    torch.testing.assert_close(weight.grad, plain[1].grad)
    torch.testing.assert_close(found.token_loss.sum() * inputs.gradient_scale, want.detach())


def test_half_precision_inputs_have_values_in_fp32() -> None:
    hidden, weight, inputs = case(1, torch.bfloat16)
    found = value_head(hidden, weight, inputs)
    found.loss.backward()
    rows = inputs.rows
    exact = (hidden.double() @ weight.double().t())[:, 0]
    assert found.values.dtype == torch.float32
    torch.testing.assert_close(found.values[rows].double(), exact[rows], rtol=1e-5, atol=1e-5)
    plain = leaf(hidden.double()), leaf(weight.double())
    reference(*plain, inputs).backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
    torch.testing.assert_close(hidden.grad.double(), plain[0].grad, rtol=0.02, atol=0.02)


def test_prompt_tokens_have_no_value_and_send_no_gradient_whatever_they_hold() -> None:
    hidden, weight, inputs = case(3)
    outside = torch.ones(TOKENS, dtype=torch.bool).index_fill(0, inputs.rows, value=False)
    assert outside.any() and len(inputs.rows)
    with torch.no_grad():
        hidden[outside] = torch.nan
    found = value_head(hidden, weight, inputs)
    found.loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    assert found.loss.isfinite() and weight.grad.isfinite().all()
    assert not found.values[outside].any() and not hidden.grad[outside].any() and hidden.grad[inputs.rows].any()


def test_a_value_beyond_the_clip_range_gets_a_gradient_only_where_it_would_come_back() -> None:
    """Old value 0, clip 0.3: both values have moved to 0.5, one past its return and one on its way there."""
    values = leaf(torch.tensor([0.5, 0.5, 0.1]))
    losses, clipped = value_losses(values, torch.zeros(3), torch.tensor([0.2, 1.0, 1.0]), CLIP)
    losses.sum().backward()
    assert clipped.tolist() == [False, True, False]
    assert values.grad is not None and values.grad.tolist() == pytest.approx([0.3, 0.0, -0.9])
    assert losses.tolist() == pytest.approx([0.045, 0.245, 0.405])


def test_without_a_clip_the_loss_is_half_the_squared_error() -> None:
    losses, clipped = value_losses(torch.tensor([2.0]), torch.tensor([0.0]), torch.tensor([1.0]), None)
    assert losses.tolist() == [0.5] and clipped.tolist() == [False]


def test_measuring_needs_no_returns_and_makes_no_loss() -> None:
    hidden, weight, inputs = case(5)
    measured = value_head(hidden, weight, ValueInputs(inputs.rows))
    trained: ValueOutputs = value_head(hidden, weight, inputs)
    assert measured.loss == 0 and not measured.token_loss.any() and torch.equal(measured.values, trained.values)


def test_a_micro_batch_without_a_response_still_has_a_gradient_of_zero() -> None:
    """Every rank must run a backward pass: others wait for it."""
    hidden, weight, inputs = case(6)
    none = replace(inputs, rows=torch.zeros(0, dtype=torch.int64), scale=torch.zeros(TOKENS))
    value_head(hidden, weight, none).loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    assert not hidden.grad.any() and not weight.grad.any()


def test_the_weight_s_gradient_is_summed_in_main_grad() -> None:
    hidden, weight, inputs = case(7, torch.float32)
    value_head(hidden, weight, inputs).loss.backward()
    assert weight.grad is not None
    held: Any = leaf(weight)
    held.main_grad = torch.ones(1, HIDDEN)
    value_head(hidden, held, inputs).loss.backward()
    torch.testing.assert_close(held.main_grad, 1 + weight.grad)
