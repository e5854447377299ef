"""Statistics and gradients of a chunk of logits by torch operations, against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nsr.losses.shard import Distribution, merge
from megatron_nsr.losses.terms import TokenInputs, token_terms
from megatron_nsr.losses.torch_rows import d_logits, loss_terms, statistics
from tests.unit.losses.cases import ALL_TERMS


def random_rows(seed: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, columns, generator=generator).double()
    return logits, torch.randint(columns, (rows,), generator=generator), generator


def distribution(logits: torch.Tensor, targets: torch.Tensor, inverse_temperature: float) -> Distribution:
    return merge(statistics(logits, targets, inverse_temperature, entropy=True)[None])


@settings(max_examples=50)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 9), columns=st.integers(1, 40), inverse=st.sampled_from([1.0, 0.8, 2.0]))
def test_statistics_are_the_sums_about_the_maximum(seed: int, rows: int, columns: int, inverse: float) -> None:
    logits, targets, _ = random_rows(seed, rows, columns)
    targets[0] = columns  # of the next shard
    maximum, total, centred, target = statistics(logits, targets, inverse, entropy=True)
    exponent = logits * inverse - (logits * inverse).amax(-1, keepdim=True)
    torch.testing.assert_close(maximum, (logits * inverse).amax(-1))
    torch.testing.assert_close(total, exponent.exp().sum(-1))
    torch.testing.assert_close(centred, (exponent.exp() * exponent).sum(-1))
    assert target[0] == -torch.inf
    torch.testing.assert_close(target[1:], (logits * inverse).gather(1, targets.clamp(max=columns - 1)[:, None])[1:, 0])
    without = statistics(logits, targets, inverse, entropy=False)
    assert not without[2].any() and torch.equal(without[[0, 1, 3]], torch.stack([maximum, total, target]))


@settings(max_examples=80)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    inverse=st.sampled_from([1.0, 0.8, 2.0]),
    bonus=st.booleans(),
    in_place=st.booleans(),
)
def test_d_logits_is_autograds_gradient(seed: int, rows: int, columns: int, inverse: float, bonus: bool, in_place: bool) -> None:
    logits, targets, generator = random_rows(seed, rows, columns)
    grad_logprob, grad_entropy = torch.randn(2, rows, generator=generator).double()
    log_p = torch.log_softmax(logits.requires_grad_() * inverse, -1)
    objective = (grad_logprob * log_p.gather(1, targets[:, None])[:, 0]).sum()
    if bonus:
        objective = objective - (grad_entropy * (log_p.exp() * log_p).sum(-1)).sum()
    (want,) = torch.autograd.grad(objective, logits)
    logits = logits.detach()
    out = logits if in_place else torch.empty_like(logits)
    softmax = distribution(logits, targets, inverse)
    got = d_logits(logits, softmax, targets, grad_logprob, grad_entropy if bonus else None, inverse, out)
    assert got is out
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_a_target_of_another_shard_adds_nothing_to_its_gradient() -> None:
    logits, targets, _ = random_rows(0, 4, 12)
    softmax, ones = distribution(logits, targets, 1.0), torch.ones(4).double()
    whole = d_logits(logits, softmax, targets, ones, None, 1.0, torch.empty_like(logits))
    parts = []
    for start, part in ((0, logits[:, :5]), (5, logits[:, 5:])):
        parts.append(d_logits(part, softmax, targets - start, ones, None, 1.0, torch.empty_like(part)))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=0)
    assert (parts[0][targets >= 5] < 0).all() and bool((targets >= 5).any())


def test_a_shard_of_padding_only_has_no_probability_and_no_gradient() -> None:
    nothing, targets = torch.empty(3, 0), torch.tensor([-5, 0, 2])
    maximum, total, centred, target = statistics(nothing, targets, 0.7, entropy=True)
    assert (maximum == -torch.inf).all() and not total.any() and not centred.any() and (target == -torch.inf).all()
    softmax = distribution(torch.randn(3, 4), torch.tensor([0, 1, 2]), 1.0)
    assert d_logits(nothing, softmax, targets, torch.ones(3), torch.ones(3), 0.7, nothing).shape == (3, 0)


def test_more_rows_than_a_cache_block_give_what_each_row_alone_gives() -> None:
    rows, columns = 40, 30_000  # over a million logits
    logits = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(rows)
    whole = statistics(logits, targets, 0.9, entropy=True)
    softmax, ones = merge(whole[None]), torch.ones(rows)
    gradient = d_logits(logits, softmax, targets, ones, ones, 0.9, torch.empty_like(logits))
    for row in (0, 17, 39):
        one = slice(row, row + 1)
        torch.testing.assert_close(statistics(logits[one], targets[one], 0.9, entropy=True), whole[:, one])
        alone = d_logits(logits[one], softmax.part(one), targets[one], ones[one], ones[one], 0.9, torch.empty_like(logits[one]))
        torch.testing.assert_close(alone, gradient[one])


def test_a_bf16_gradient_is_rounded_once() -> None:
    logits, targets, _ = random_rows(2, 6, 50)
    logits, ones = logits.float(), torch.ones(6)
    softmax = distribution(logits, targets, 1.0)
    exact = d_logits(logits, softmax, targets, ones, ones, 1.0, torch.empty_like(logits))
    rounded = d_logits(logits, softmax, targets, ones, ones, 1.0, torch.empty_like(logits, dtype=torch.bfloat16))
    assert torch.equal(rounded, exact.bfloat16())


@pytest.mark.parametrize("shards", [1, 3])
def test_loss_terms_are_the_formulas_on_the_merged_softmax(shards: int) -> None:
    logits, targets, generator = random_rows(3, 5, 12)
    width = 12 // shards
    gathered = torch.stack([statistics(logits[:, i : i + width], targets - i, 1.0, entropy=True) for i in range(0, 12, width)])
    known = torch.randn(3, 5, generator=generator).double() - 1
    tokens = TokenInputs(torch.randn(5, generator=generator).double(), torch.rand(5).double(), *known)
    softmax, token = loss_terms(gathered, tokens, ALL_TERMS)
    want = token_terms(softmax.logprob, softmax.entropy, tokens, ALL_TERMS)
    assert torch.equal(token.loss, want.loss) and torch.equal(token.grad_logprob, want.grad_logprob)
    torch.testing.assert_close(softmax.logprob, torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0])
