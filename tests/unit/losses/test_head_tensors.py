"""What enters the head: which parts belong to a chunk."""

from __future__ import annotations

import pytest
import torch

from megatron_nsr.losses.head_tensors import HeadInputs, HeadOutputs
from megatron_nsr.losses.terms import LossTerms
from tests.unit.losses.cases import random_case


@pytest.mark.parametrize("rows", [slice(2, 5), torch.tensor([0, 4, 11])])
def test_a_chunks_tokens_are_those_of_its_rows(rows: slice | torch.Tensor) -> None:
    inputs = random_case(0).inputs
    tokens = inputs.tokens(rows)
    for name in ("weights", "scale", "old_logprobs", "reference_logprobs", "rollout_logprobs"):
        assert torch.equal(getattr(tokens, name), getattr(inputs, name)[rows])


def test_what_is_not_given_stays_away() -> None:
    inputs = HeadInputs(torch.arange(3), torch.ones(3), torch.ones(3))
    tokens = inputs.tokens(slice(0, 2))
    assert tokens.old_logprobs is None and tokens.reference_logprobs is None and tokens.rollout_logprobs is None
    inputs.check(LossTerms(dual_clip=3.0, entropy_coefficient=0.1))  # neither needs anything more


@pytest.mark.parametrize("sign_norms", [True, False])
def test_outputs_begin_as_zeros(sign_norms: bool) -> None:
    outputs = HeadOutputs.zeros(4, torch.float64, torch.device("cpu"), sign_norms=sign_norms)
    assert (outputs.input_grad_sq is not None) is sign_norms
    given = [x for x in outputs.astuple() if x is not None]
    assert all(not x.any() for x in given) and outputs.clipped.dtype == torch.bool
    assert {x.dtype for x in given} == {torch.float64, torch.bool}
