"""What the head spends: matrix products, passes over the logits, memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_nsr.losses.head_tensors import HeadInputs
from megatron_nsr.losses.terms import LossTerms
from tests.unit.losses.cases import ALL_TERMS, Case, random_case
from tests.unit.losses.op_recorder import OpRecorder

TOKENS, VOCAB, HIDDEN, CHUNK = 256, 400, 8, 16
LOGITS = 4 * CHUNK * VOCAB  # bytes of one chunk's logits in fp32
MEASURING: dict[str, Any] = {"weights": None, "scale": None}
OWN_LOSS: dict[str, Any] = {"own_loss": lambda logprobs, entropy: -logprobs - 0.1 * entropy}
BONUS = LossTerms(entropy_coefficient=0.05)


def recorded(case: Case, terms: LossTerms, **options: Any) -> OpRecorder:
    """Forward and, where there is a loss, backward."""
    case.hidden.grad = case.weight.grad = None
    with OpRecorder() as recorder:
        loss = case.run(terms, chunk=CHUNK, **options).loss
        if loss.requires_grad:
            loss.backward()
    return recorder


def case_of(dtype: torch.dtype = torch.float32, **fields: Any) -> Case:
    return random_case(1, tokens=TOKENS, vocab=VOCAB, hidden=HIDDEN, dtype=dtype, **fields)


@pytest.mark.parametrize(
    ("products", "terms", "fields"),
    [
        (1, LossTerms(), MEASURING),
        (3, LossTerms(), {}),
        (3, ALL_TERMS, {}),
        (3, replace(ALL_TERMS, entropy_coefficient=0.0), {"sign_norms": True}),
        (4, BONUS, {"sign_norms": True}),
        (4, LossTerms(), OWN_LOSS),
    ],
    ids=["measuring", "plain", "all terms", "sign norms", "sign norms and entropy bonus", "own loss"],
)
def test_matrix_products_a_chunk(products: int, terms: LossTerms, fields: dict[str, Any]) -> None:
    assert recorded(case_of(**fields), terms).products == products * TOKENS // CHUNK


@pytest.mark.parametrize(("fields", "products"), [({}, 3), (MEASURING, 1), (OWN_LOSS, 4)], ids=["trains", "measures", "own loss"])
def test_tokens_outside_the_rows_cost_no_product(fields: dict[str, Any], products: int) -> None:
    case = case_of(rows=torch.arange(0, TOKENS, 3), **fields)
    assert recorded(case, LossTerms()).products == products * -(-len(range(0, TOKENS, 3)) // CHUNK)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_costs_no_product_of_its_own_loss(frozen: str) -> None:
    case = case_of(**OWN_LOSS)
    assert recorded(replace(case, **{frozen: getattr(case, frozen).detach()}), LossTerms()).products == 3 * TOKENS // CHUNK


def test_without_gradients_a_loss_costs_the_logits_only() -> None:
    with torch.no_grad():
        assert recorded(case_of(), ALL_TERMS).products == TOKENS // CHUNK


@pytest.mark.parametrize("fields", [{}, MEASURING], ids=["trains", "measures"])
def test_unmeasured_entropy_saves_a_pass_over_the_logits(fields: dict[str, Any]) -> None:
    chunks, case = TOKENS // CHUNK, case_of(**fields)
    measured = recorded(case, LossTerms()).counts
    unmeasured = recorded(case.with_inputs(measure_entropy=False), LossTerms()).counts
    assert (measured - unmeasured)["sum"] == (measured - unmeasured)["mul"] == chunks  # of weights times exponents
    assert not unmeasured - measured


@pytest.mark.parametrize("known", ["reference_logprobs", "rollout_logprobs"])
def test_a_term_that_is_off_costs_nothing(known: str) -> None:
    """A tensor that no term needs is not looked at, beyond taking its part."""
    given, absent = (recorded(case_of(**fields), LossTerms()).counts for fields in ({}, {known: None}))
    assert {name: count for name, count in (given - absent).items() if name != "slice"} == {}


@pytest.mark.parametrize(
    ("switched_on", "ops"),
    [
        ({"kl_coefficient": 0.1}, {"expm1"}),
        ({"correction_cap": 1.5}, {"exp"}),
        ({"dual_clip": 2.0}, {"where"}),
        ({"entropy_coefficient": 0.1}, {"add_"}),
    ],
)
def test_a_coefficient_of_zero_runs_none_of_its_terms_operations(switched_on: dict[str, float], ops: set[str]) -> None:
    on, off = (recorded(case_of(), terms).counts for terms in (LossTerms(**switched_on), LossTerms()))
    assert all(on[op] > off[op] for op in ops) and on.total() > off.total()


VARIANTS = {"gradient in forward": {}, "sign norms": {"sign_norms": True}, "own loss": OWN_LOSS, "measuring": MEASURING}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("response_rows", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_tensor_of_tokens_by_vocabulary_exists(variant: str, response_rows: bool, dtype: torch.dtype) -> None:
    case = random_case(1, tokens=512, vocab=VOCAB, dtype=dtype, response_rows=response_rows, **VARIANTS[variant])
    recorder = recorded(case, BONUS)
    assert recorder.largest_bytes <= LOGITS
    assert recorder.peak_bytes < 4 * 512 * VOCAB / 4  # all that lives at once, gradients and results included


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_does_not_grow_with_the_tokens_times_the_vocabulary(dtype: torch.dtype) -> None:
    peaks = [recorded(random_case(1, tokens=n, vocab=VOCAB, hidden=HIDDEN, dtype=dtype), BONUS).peak_bytes for n in (64, 512)]
    assert peaks[1] - peaks[0] < (512 - 64) * dtype.itemsize * (HIDDEN + 20)  # a gradient and some numbers a token


@pytest.mark.parametrize("own_loss", [None, OWN_LOSS["own_loss"]], ids=["built in", "own loss"])
@pytest.mark.parametrize("main_grad", [True, False])
def test_main_grad_saves_a_buffer_of_the_weights_size(main_grad: bool, own_loss: Any) -> None:
    states, weight = torch.randn(64, 64).requires_grad_(), torch.nn.Parameter(torch.randn(VOCAB, 64))
    inputs = HeadInputs(torch.arange(64), torch.ones(64), torch.ones(64), own_loss=own_loss)
    if main_grad:
        weight.main_grad = torch.zeros(VOCAB, 64)
    recorder = recorded(Case(states, weight, inputs), BONUS)
    assert (recorder.largest_bytes < 4 * VOCAB * 64) is main_grad
