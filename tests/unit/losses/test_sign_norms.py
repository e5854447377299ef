"""The norm of what each token's loss sends into its hidden state, measured while the gradient is formed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nsr.losses.terms import LossTerms
from tests.unit.losses.cases import (
    ALL_TERMS,
    Case,
    cases,
    gradients,
    loss_terms,
    random_case,
    reference_input_grad_sq,
    relative_error,
)


@settings(max_examples=100)
@given(case=cases(sign_norms=True), terms=loss_terms(), chunk=st.integers(1, 9))
def test_norms_are_of_the_main_term_whatever_the_entropy_bonus(case: Case, terms: LossTerms, chunk: int) -> None:
    got = case.run(terms, chunk=chunk).input_grad_sq
    assert got is not None
    torch.testing.assert_close(got, reference_input_grad_sq(case, terms), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("terms", [LossTerms(), ALL_TERMS], ids=["plain", "all terms"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_norms_of_fp32_and_bf16_inputs(dtype: torch.dtype, tolerance: float, terms: LossTerms) -> None:
    case = random_case(1, dtype=dtype, sign_norms=True, gradient_scale=3.0, loss_gradient=0.25)
    got = case.run(terms).input_grad_sq
    assert got is not None and got.dtype == torch.float32
    assert relative_error(got, reference_input_grad_sq(case, terms)) < tolerance


@pytest.mark.parametrize("terms", [LossTerms(), ALL_TERMS], ids=["plain", "all terms"])
def test_measuring_norms_changes_nothing_else(terms: LossTerms) -> None:
    case = random_case(2)
    plain, normed = case.run(terms), case.with_inputs(sign_norms=True).run(terms)
    assert plain.input_grad_sq is None
    assert all(torch.equal(a, b) for a, b in zip(plain.astuple()[:-1], normed.astuple()[:-1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients(plain.loss, case), gradients(normed.loss, case), strict=True))


def test_norms_are_measured_without_gradients_too() -> None:
    case = random_case(3, sign_norms=True)
    trained = case.run(ALL_TERMS).input_grad_sq
    with torch.no_grad():
        measured = case.run(ALL_TERMS).input_grad_sq
    assert trained is not None and measured is not None and torch.equal(trained, measured)
