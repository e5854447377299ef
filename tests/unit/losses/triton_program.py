"""The Triton kernels against torch operations and float64. test_triton_rows.py runs this file in a pytest of its own.

Under TRITON_INTERPRET=1, which must stand before Triton is first imported, the kernels run on the CPU in Triton's interpreter.
Without it this file needs a CUDA device: `python -m pytest tests/unit/losses/triton_program.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_nsr.losses import torch_rows, triton_gradient, triton_rows, triton_statistics
from megatron_nsr.losses.head_tensors import HeadInputs
from megatron_nsr.losses.reference import reference_loss
from megatron_nsr.losses.shard import Distribution, merge
from megatron_nsr.losses.terms import LossTerms, TokenInputs
from tests.unit.losses.cases import ALL_TERMS, Case, leaf, loss_terms, random_case, reference_gradients, relative_error

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
EPSILON = torch.finfo(torch.float32).eps
TILE = 16  # so that small shapes have several tiles
UNCLIPPED = replace(ALL_TERMS, eps_low=0.9, eps_high=9.0, dual_clip=None)  # rounding may not move a token over a bound


@pytest.fixture(scope="module")
def small_tiles() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_statistics, "_TILE", TILE)
        patch.setattr(triton_gradient, "_TILE", TILE)
        yield


def random_logits(seed: int, rows: int, columns: int, kind: str = "plain") -> tuple[Tensor, Tensor]:
    """(logits, targets); every other target is the likeliest column."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, columns, generator=generator)
    if kind == "near -150":
        logits = logits / 3 - 150
    elif kind == "one at 3e4":
        logits[torch.arange(rows), torch.randint(columns, (rows,), generator=generator)] = 3e4
    elif kind == "offset 5000":
        logits = logits + 5000
    targets = torch.randint(columns, (rows,), generator=generator)
    targets[::2] = logits.argmax(-1)[::2]
    return logits.to(DEVICE), targets.to(DEVICE)


def few_ulp(logits: Tensor, inverse_temperature: float) -> float:
    return 4 * EPSILON * max(1.0, float(logits.abs().max()) * inverse_temperature)


def close(got: Tensor, want: Tensor, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)


KINDS = st.sampled_from(["plain", "near -150", "one at 3e4", "offset 5000"])
SIZES = {"seed": st.integers(0, 10_000), "rows": st.integers(1, 3), "columns": st.integers(1, 3 * TILE + 2)}
TEMPERATURES = st.sampled_from([1.0, 0.7])


@settings(max_examples=60)
@given(**SIZES, kind=KINDS, temperature=TEMPERATURES)
def test_statistics_equal_torch_and_float64(small_tiles: None, seed: int, rows: int, columns: int, kind: str, temperature: float) -> None:
    logits, targets = random_logits(seed, rows, columns, kind)
    got = triton_rows.statistics(logits, targets, 1 / temperature, entropy=True)
    want = torch_rows.statistics(logits, targets, 1 / temperature, entropy=True)
    assert torch.equal(got[[0, 3]], want[[0, 3]])
    close(got, want, 1e-5)  # of the sums
    softmax, exact = merge(got[None]), torch.log_softmax(logits.double() / temperature, -1)
    tolerance = few_ulp(logits, 1 / temperature)
    assert (softmax.logprob - exact.gather(1, targets[:, None])[:, 0]).abs().max() < tolerance
    assert (softmax.entropy + (exact.exp() * exact).sum(-1)).abs().max() < max(tolerance, 4e-6)
    assert softmax.logprob.max() <= 0


def test_statistics_of_whole_tiles_as_a_gpu_runs_them() -> None:
    logits, targets = random_logits(0, 2, triton_statistics._TILE + 5)
    close(
        triton_rows.statistics(logits, targets, 1.0, entropy=True),
        torch_rows.statistics(logits.double(), targets, 1.0, entropy=True),
        1e-5,
    )


def test_without_entropy_the_centred_sum_is_zero_and_the_rest_the_same(small_tiles: None) -> None:
    logits, targets = random_logits(1, 3, 37)
    whole = triton_rows.statistics(logits, targets, 1.0, entropy=True)
    got = triton_rows.statistics(logits, targets, 1.0, entropy=False)
    assert torch.equal(got[[0, 1, 3]], whole[[0, 1, 3]]) and not got[2].any() and whole[2].all()


def test_a_target_of_another_shard_is_minus_infinity(small_tiles: None) -> None:
    logits, _ = random_logits(2, 5, 20)
    targets = torch.tensor([-1, 20, -7, 10**9, 19], device=DEVICE)
    picked = triton_rows.statistics(logits, targets, 1.0, entropy=False)[3]
    assert torch.equal(picked, torch.tensor([-torch.inf] * 4 + [float(logits[4, 19])], device=DEVICE))


def test_a_shard_of_padding_only_says_nothing(small_tiles: None) -> None:
    logits, targets = torch.empty(3, 0, device=DEVICE), torch.arange(3, device=DEVICE)
    for entropy in (True, False):
        got = triton_rows.statistics(logits, targets, 1.0, entropy=entropy)
        assert torch.equal(got, torch_rows.statistics(logits, targets, 1.0, entropy=entropy))


def test_a_logit_that_is_no_number_leaves_no_numbers(small_tiles: None) -> None:
    logits, targets = random_logits(3, 2, 40)
    logits[0, 30] = torch.nan
    softmax, token = triton_rows.loss_terms(triton_rows.statistics(logits, targets, 1.0, entropy=True)[None], tokens(2), ALL_TERMS)
    assert softmax.logprob.isnan().tolist() == softmax.entropy.isnan().tolist() == token.loss.isnan().tolist() == [True, False]


@pytest.mark.parametrize("cut", [(0, 24, 48), (0, 5, 48, 48), (0, 16, 32, 48)])
def test_shards_merge_to_the_whole(small_tiles: None, cut: tuple[int, ...]) -> None:
    """Shards here are columns of one buffer: rows that do not touch."""
    logits, targets = random_logits(4, 6, 48)
    shards = [slice(*bounds) for bounds in pairwise(cut)]
    gathered = torch.stack([triton_rows.statistics(logits[:, shard], targets - shard.start, 0.8, entropy=True) for shard in shards])
    whole = triton_rows.statistics(logits, targets, 0.8, entropy=True)[None]
    softmax, token = triton_rows.loss_terms(gathered, tokens(6), ALL_TERMS)
    want, want_token = triton_rows.loss_terms(whole, tokens(6), ALL_TERMS)
    same_fields(softmax, want)
    same_fields(token, want_token, 2e-5)
    expected = torch.empty_like(logits)
    triton_rows.d_logits(logits, want, targets, want_token.grad_logprob, want_token.grad_entropy, 0.8, expected)
    for shard in shards:
        part = logits[:, shard]
        triton_rows.d_logits(part, softmax, targets - shard.start, token.grad_logprob, token.grad_entropy, 0.8, part)
    close(logits, expected, 2e-5)


def tokens(rows: int, seed: int = 0, *, on_policy: bool = False, spread: float = 0.5) -> TokenInputs:
    """A third of the tokens masked, an eighth of the weights zero; log-probs around -3."""
    generator = torch.Generator().manual_seed(seed)
    weights, old, reference, rollout = torch.randn(4, rows, generator=generator)
    weights[torch.rand(rows, generator=generator) < 1 / 8] = 0
    scale = torch.rand(rows, generator=generator)
    scale[1:][torch.rand(rows - 1, generator=generator) < 1 / 3] = 0
    old, reference, rollout = (-3 + spread * values for values in (old, reference, rollout))
    inputs = (weights, scale, None if on_policy else old, reference, rollout)
    return TokenInputs(*(None if values is None else values.to(DEVICE) for values in inputs))


def random_statistics(seed: int, rows: int, shards: int) -> Tensor:
    """Of 12 columns a shard, the target of each row in one of them."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shards, rows, 12, generator=generator)
    targets = torch.randint(12 * shards, (rows,), generator=generator)
    return torch.stack([torch_rows.statistics(part, targets - 12 * i, 1.0, entropy=True) for i, part in enumerate(logits)]).to(DEVICE)


def same_fields(got: object, want: object, tolerance: float = 2e-6) -> None:
    for field in fields(want):  # type: ignore[arg-type]
        values, expected = getattr(got, field.name), getattr(want, field.name)
        assert (values is None) == (expected is None), field.name
        if expected is not None and expected.dtype == torch.bool:
            assert torch.equal(values, expected), field.name
        elif expected is not None:
            close(values, expected, tolerance)


@settings(max_examples=120)
@given(
    seed=st.integers(0, 10_000),
    rows=st.sampled_from([1, 40, 300]),
    shards=st.sampled_from([1, 2, 3]),
    on_policy=st.booleans(),
    spread=st.sampled_from([0.01, 0.5, 15.0]),  # the last beyond the bound of exp()
    terms=loss_terms(),
)
def test_loss_terms_equal_torch_and_float64(seed: int, rows: int, shards: int, on_policy: bool, spread: float, terms: LossTerms) -> None:
    gathered, inputs = random_statistics(seed, rows, shards), tokens(rows, seed, on_policy=on_policy, spread=spread)
    softmax, token = triton_rows.loss_terms(gathered, inputs, terms)
    want, want_token = torch_rows.loss_terms(gathered, inputs, terms)
    same_fields(softmax, want)
    same_fields(token, want_token, 5e-6)
    exact, exact_token = torch_rows.loss_terms(gathered.double(), inputs, terms)
    same_fields(softmax, exact)
    same_fields(token, exact_token, 2e-5)


def test_the_token_inputs_exercise_both_bounds() -> None:
    gathered, inputs = random_statistics(0, 300, 2), tokens(300)
    clipped = triton_rows.loss_terms(gathered, inputs, ALL_TERMS)[1].clipped
    for side in (inputs.weights > 0, inputs.weights < 0):
        assert (clipped & side).any() and (~clipped & side & (inputs.scale > 0)).any()
    assert not (clipped & ((inputs.weights == 0) | (inputs.scale == 0))).any()


def test_weights_of_another_dtype_are_taken_as_fp32() -> None:
    gathered, inputs = random_statistics(0, 40, 1), tokens(40)
    precise = replace(inputs, weights=inputs.weights.double(), scale=inputs.scale.double())
    same_fields(triton_rows.loss_terms(gathered, precise, ALL_TERMS)[1], triton_rows.loss_terms(gathered, inputs, ALL_TERMS)[1], 0.0)


def gradient_case(seed: int, rows: int, columns: int, kind: str, inverse_temperature: float) -> tuple[Tensor, Tensor, Distribution, Tensor]:
    """(logits, targets, their softmax, two gradients a row); one target is on another shard."""
    logits, targets = random_logits(seed, rows, columns, kind)
    softmax = merge(torch_rows.statistics(logits, targets, inverse_temperature, entropy=True)[None])
    targets[1:2] = -1
    grads = torch.randn(2, rows, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return logits, targets, softmax, grads


def exact_gradient(logits: Tensor, targets: Tensor, grads: Tensor, inverse_temperature: float) -> Tensor:
    """By autograd in float64."""
    exact = leaf(logits.double())
    log_p = torch.log_softmax(exact * inverse_temperature, -1)
    here = targets >= 0
    # A target on another shard leaves the other terms of its row: -log of the softmax's denominator has the same gradient here.
    logprob = torch.where(here, log_p.gather(1, targets.clamp_min(0)[:, None])[:, 0], -torch.logsumexp(exact * inverse_temperature, -1))
    entropy = -(log_p.exp() * log_p).sum(-1)
    return torch.autograd.grad((grads[0] * logprob + grads[1] * entropy).sum(), exact)[0]


@settings(max_examples=60)
@given(**SIZES, kind=KINDS, temperature=TEMPERATURES, with_entropy=st.booleans(), in_place=st.booleans())
def test_d_logits_equal_torch_and_float64(
    small_tiles: None, seed: int, rows: int, columns: int, kind: str, temperature: float, with_entropy: bool, in_place: bool
) -> None:
    logits, targets, softmax, grads = gradient_case(seed, rows, columns, kind, 1 / temperature)
    given, kept = (grads[0], grads[1] if with_entropy else None), logits.clone()
    want = torch_rows.d_logits(kept, softmax, targets, *given, 1 / temperature, torch.empty_like(logits))
    out = logits if in_place else torch.full_like(logits, torch.nan)
    assert triton_rows.d_logits(logits, softmax, targets, *given, 1 / temperature, out) is out
    close(out, want)
    assert in_place or torch.equal(logits, kept)
    grads[1] *= with_entropy
    exact = exact_gradient(kept, targets, grads, 1 / temperature)
    close(out, exact, max(1e-5, 4 * few_ulp(kept, 1 / temperature)))


def test_the_gradient_in_bf16_is_rounded_from_fp32(small_tiles: None) -> None:
    logits, targets, softmax, grads = gradient_case(5, 4, 45, "plain", 1.4)
    want = torch_rows.d_logits(logits, softmax, targets, *grads, 1.4, torch.empty_like(logits))
    kept, out = logits.clone(), torch.empty_like(logits, dtype=torch.bfloat16)
    triton_rows.d_logits(logits, softmax, targets, *grads, 1.4, out)
    # Triton's interpreter truncates where a GPU rounds to nearest: one unit in the last place instead of half.
    assert ((out - want).abs() <= 2**-7 * want.abs()).all()
    assert torch.equal(logits, kept)


def test_the_gradients_of_whole_tiles_as_a_gpu_runs_them() -> None:
    logits, targets, softmax, grads = gradient_case(6, 2, triton_gradient._TILE + 5, "plain", 1.0)
    want = exact_gradient(logits, targets, grads, 1.0)
    close(triton_rows.d_logits(logits, softmax, targets, *grads, 1.0, logits), want, 1e-5)


def test_vectors_of_any_stride_are_taken(small_tiles: None) -> None:
    """Autograd hands over expanded gradients: one number for all tokens."""
    logits, targets, softmax, _ = gradient_case(7, 4, 20, "plain", 1.0)
    ones = torch.ones((), device=DEVICE)
    got = triton_rows.d_logits(logits, softmax, targets, ones.expand(4), ones.expand(4), 1.0, torch.empty_like(logits))
    close(got, exact_gradient(logits, targets, ones.expand(2, 4), 1.0), 1e-5)
    every_other = torch.stack([targets, targets - 7], 1).flatten()[::2]
    assert torch.equal(
        triton_rows.statistics(logits, every_other, 1.0, entropy=True), triton_rows.statistics(logits, targets, 1.0, entropy=True)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_logits_of_another_dtype_are_refused(dtype: torch.dtype) -> None:
    logits, targets, softmax, grads = gradient_case(8, 2, 5, "plain", 1.0)
    message = f"float32 logits, not {dtype}: use the head with kernels='torch'"
    with pytest.raises(TypeError, match=message):
        triton_rows.statistics(logits.to(dtype), targets, 1.0, entropy=True)
    with pytest.raises(TypeError, match=message):
        triton_rows.d_logits(logits.to(dtype), softmax, targets, *grads, 1.0, logits)


def test_transposed_logits_are_refused() -> None:
    logits, targets = random_logits(9, 4, 4)
    with pytest.raises(ValueError, match="columns of logits must be contiguous, not 4 elements apart"):
        triton_rows.statistics(logits.t(), targets, 1.0, entropy=True)


def head_case(**options: object) -> Case:
    case = random_case(tokens=9, hidden=6, **options)  # type: ignore[arg-type]
    inputs = [value.to(DEVICE) if isinstance(value, Tensor) else value for value in map(case.inputs.__getattribute__, NAMES)]
    return replace(case, hidden=leaf(case.hidden.to(DEVICE)), weight=leaf(case.weight.to(DEVICE)), inputs=HeadInputs(*inputs))


NAMES = [field.name for field in fields(HeadInputs)]
HEADS = [
    (torch.float32, LossTerms(), {}),
    (torch.float32, UNCLIPPED, {"temperature": 0.7, "response_rows": True, "sign_norms": True, "gradient_scale": 1.7}),
    (torch.bfloat16, UNCLIPPED, {"temperature": 0.7}),
    (torch.bfloat16, LossTerms("probability"), {"on_policy": True, "measure_entropy": False}),
    (torch.float32, LossTerms("reinforce", entropy_coefficient=0.05), {"vocab": 1}),
]


@pytest.mark.parametrize(("dtype", "terms", "options"), HEADS)
def test_the_head_on_these_kernels_equals_the_reference(
    small_tiles: None, dtype: torch.dtype, terms: LossTerms, options: dict[str, object]
) -> None:
    case = head_case(dtype=dtype, **options)
    outputs = [case.run(terms, kernels="triton") for _ in range(2)]
    grads = [torch.autograd.grad(output.loss, (case.hidden, case.weight)) for output in outputs]
    for first, second in zip([*outputs[0].astuple(), *grads[0]], [*outputs[1].astuple(), *grads[1]], strict=True):
        assert first is second is None or torch.equal(first, second)
    exact = reference_loss(case.hidden, case.weight, case.inputs, terms, case.temperature)
    assert outputs[0].loss.item() == pytest.approx(exact["loss"].item(), rel=1e-5, abs=1e-6)
    looked_at = slice(None) if case.inputs.rows is None else case.inputs.rows
    close(outputs[0].logprobs[looked_at], exact["logprobs"][looked_at], 1e-5)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7  # the gradient is rounded to the inputs' dtype
    for got, want in zip(grads[0], reference_gradients(case, terms), strict=True):
        assert (got.double() - want).abs().max() <= tolerance * want.abs().max() + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_of_ones_own_and_measuring_run_on_these_kernels(small_tiles: None, dtype: torch.dtype) -> None:
    case = head_case(dtype=dtype, own_loss=lambda logprob, entropy: logprob.square() - 0.3 * entropy)
    grads = [
        torch.autograd.grad(case.run(LossTerms(), kernels=kernels).loss, (case.hidden, case.weight)) for kernels in ("torch", "triton")
    ]
    for want, got in zip(*grads, strict=True):
        assert relative_error(got, want) < (1e-5 if dtype == torch.float32 else 2**-7)
    measured = [case.with_inputs(weights=None, scale=None, own_loss=None).run(LossTerms(), kernels=name) for name in ("torch", "triton")]
    close(measured[1].logprobs, measured[0].logprobs)
    close(measured[1].entropy, measured[0].entropy, 5e-6)
