"""The head's products: fp32 sums of bf16 numbers, and e4m3 logits."""

from __future__ import annotations

import pytest
import torch

from megatron_nsr.losses.products import FP8, HeadWeight, accumulation_dtype
from megatron_nsr.losses.reference import reference_loss
from megatron_nsr.losses.terms import LossTerms
from tests.unit.losses.cases import gradients, random_case, reference_gradients

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def sides(dtype: torch.dtype, rows: int = 13, columns: int = 37, hidden: int = 20) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(n, hidden, generator=generator).to(dtype) for n in (rows, columns))
    return states, weight, torch.randn(rows, columns, generator=generator).to(accumulation_dtype(states))


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_summed_and_kept_in_fp32(dtype: torch.dtype) -> None:
    states, weight, _ = sides(dtype)
    logits, exact = HeadWeight(weight).logits(states), states.double() @ weight.double().t()
    assert logits.dtype == accumulation_dtype(states)
    assert (logits - exact).abs().max() < 8 * torch.finfo(logits.dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_d_hidden_comes_in_the_hidden_states_dtype(dtype: torch.dtype) -> None:
    _, weight, d_logits = sides(dtype)
    got, exact = HeadWeight(weight).d_hidden(d_logits), d_logits.double() @ weight.double()
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps, atol=20 * torch.finfo(d_logits.dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_d_weight_is_added_in_place_in_fp32(dtype: torch.dtype) -> None:
    states, weight, d_logits = sides(dtype)
    total = torch.full((40, 20), 100.0, dtype=accumulation_dtype(weight))
    for _ in range(2):
        HeadWeight(weight).add_d_weight(total[:37], d_logits, states)
    exact = 100 + 2 * (d_logits.double().t() @ states.double())
    torch.testing.assert_close(total[:37].double(), exact, rtol=8 * torch.finfo(total.dtype).eps, atol=0)
    assert (total[37:] == 100).all()


def test_the_weight_itself_is_never_changed_nor_part_of_a_graph() -> None:
    weight = torch.nn.Parameter(torch.randn(5, 4))
    before = weight.detach().clone()
    logits = HeadWeight(weight).logits(torch.randn(3, 4))
    assert not logits.requires_grad and torch.equal(weight, before)


def rounded_to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """What a side becomes when its largest magnitude is scaled to 448, e4m3's largest."""
    scale = x.abs().max().float() / 448
    return (x.float() / scale).to(FP8).double() * scale.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "hidden"), [(13, 37, 32), (1, 1, 16), (16, 48, 64), (5, 100, 48)])
def test_fp8_logits_are_the_product_of_the_rounded_sides(rows: int, columns: int, hidden: int, dtype: torch.dtype) -> None:
    states, weight, _ = sides(dtype, rows, columns, hidden)
    states, weight = 50 * states, 0.01 * weight
    logits = HeadWeight(weight, fp8=True).logits(states)
    exact = rounded_to_e4m3(states) @ rounded_to_e4m3(weight).t()
    assert logits.shape == (rows, columns) and logits.dtype == accumulation_dtype(states)
    assert (logits - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("zero", ["states", "weight"])
def test_fp8_of_zeros_is_zero(zero: str) -> None:
    states, weight, _ = sides(torch.float32, hidden=16)
    logits = HeadWeight(weight * (zero != "weight"), fp8=True).logits(states * (zero != "states"))
    assert not logits.any()


def test_fp8_of_a_shard_of_padding_only_is_empty() -> None:
    states, weight, _ = sides(torch.float32, hidden=16)
    assert HeadWeight(weight[:0], fp8=True).logits(states).shape == (13, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_log_probs_err_by_no_more_than_the_rounding_of_the_sides(dtype: torch.dtype) -> None:
    """e4m3 has three bits behind the point: a side's number errs by 2^-4 of itself at most, so a product by little over 2^-3."""
    case = random_case(1, tokens=64, vocab=101, hidden=32, dtype=dtype)
    exact, (states, weight) = case.exact(), (x.detach().double().abs() for x in (case.hidden, case.weight))
    expected = reference_loss(exact.hidden, exact.weight, exact.inputs, LossTerms())
    output = case.run(LossTerms(), chunk=16, fp8=True)
    error = (output.logprobs - expected["logprobs"]).abs()
    assert bool((error <= 2 * 0.13 * (states @ weight.t()).amax(-1)).all())  # the target's logit and all the others
    assert 0.01 < error.square().mean().sqrt() < 0.5  # errors are independent: logits of standard deviation 6 err by about 0.2


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_gradients_are_near_the_exact_ones(dtype: torch.dtype) -> None:
    case, terms = (
        random_case(2, tokens=64, vocab=101, hidden=32, dtype=dtype, temperature=6.0),
        LossTerms("reinforce", entropy_coefficient=0.05),
    )
    for got, want in zip(gradients(case.run(terms, fp8=True).loss, case), reference_gradients(case, terms), strict=True):
        assert 1e-4 * want.norm() < (got - want).norm() < 0.05 * want.norm()
