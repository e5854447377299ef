"""The weight's gradient in main_grad: in fp32, each micro-batch once, and with megatron-core's data-parallel hooks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_nsr.losses.head_tensors import HeadInputs, HeadOptions
from megatron_nsr.losses.policy_head import policy_head
from megatron_nsr.losses.shard import VocabularyShard
from megatron_nsr.losses.terms import LossTerms
from megatron_nsr.losses.weight_gradient import WeightGradient
from megatron_nsr.models.backends import choose_backend
from megatron_nsr.models.parallel import destroy_parallel
from megatron_nsr.platform import distributed
from tests.unit.losses.cases import ALL_TERMS, Case, random_case, reference_gradients, relative_error

DTYPES = [torch.float32, torch.bfloat16]
VARIANTS: dict[str, Any] = {"built in": None, "own loss": lambda logprobs, entropy: -logprobs * torch.linspace(-1, 2, len(logprobs))}
TERMS = LossTerms("reinforce", entropy_coefficient=0.05)


def micro_batches(dtype: torch.dtype, own_loss: Any) -> list[Case]:
    """Two of them over one weight."""
    first, second = (random_case(seed, dtype=dtype, own_loss=own_loss, loss_gradient=0.5) for seed in (1, 2))
    weight = torch.nn.Parameter(first.weight.detach().clone())
    return [Case(case.hidden, weight, case.inputs) for case in (first, second)]


def d_weight(case: Case) -> Tensor:
    """By float64 autograd."""
    if case.inputs.own_loss is None:
        return reference_gradients(case, TERMS)[1]
    exact = case.exact()
    log_p = torch.log_softmax(exact.hidden @ exact.weight.t(), -1)
    logprobs = log_p.gather(1, case.inputs.targets[:, None])[:, 0]
    losses = case.inputs.own_loss(logprobs, logprobs) + TERMS.entropy_coefficient * (log_p.exp() * log_p).sum(-1)
    loss = (case.inputs.scale * losses).sum() * case.inputs.loss_gradient
    return torch.autograd.grad(loss, exact.weight)[0]


def backward(loss: Tensor, weight: Tensor) -> None:
    """As data parallelism does it: main_grad gets the gradient that autograd carries, unless it has it already."""
    loss.backward()
    if weight.grad is not None and not getattr(weight, "grad_added_to_main_grad", False):
        weight.main_grad += weight.grad
    weight.grad = None


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_main_grad_gathers_micro_batches_in_fp32(dtype: torch.dtype, variant: str) -> None:
    cases = micro_batches(dtype, VARIANTS[variant])
    weight = cases[0].weight
    weight.main_grad = torch.full(weight.shape, 0.25)
    for case in cases:
        backward(case.run(TERMS).loss * 0.5, weight)
    assert weight.grad_added_to_main_grad is True
    assert relative_error(weight.main_grad - 0.25, sum(d_weight(case) for case in cases)) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("main_grad", [None, torch.bfloat16], ids=["none", "bf16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_an_fp32_main_grad_autograd_gets_the_gradient(dtype: torch.dtype, main_grad: torch.dtype | None, variant: str) -> None:
    cases = micro_batches(dtype, VARIANTS[variant])
    weight = cases[0].weight
    if main_grad is not None:
        weight.main_grad = torch.zeros(weight.shape, dtype=main_grad)
    for case in cases:
        (case.run(TERMS).loss * 0.5).backward()
    assert weight.grad is not None and weight.grad.dtype == dtype
    assert relative_error(weight.grad, sum(d_weight(case) for case in cases)) < (1e-5 if dtype == torch.float32 else 2**-7)
    assert main_grad is None or not weight.main_grad.any()
    assert not getattr(weight, "grad_added_to_main_grad", False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_placeholder_looks_like_the_weight_and_takes_no_memory(dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(torch.randn(6, 3).to(dtype))
    weight.main_grad = torch.zeros(6, 3)
    placeholder = WeightGradient(weight).for_autograd()
    assert placeholder is not None and (placeholder.shape, placeholder.dtype) == (weight.shape, dtype)
    assert placeholder.untyped_storage().data_ptr() == weight.main_grad.untyped_storage().data_ptr()
    assert weight.grad_added_to_main_grad is True


def test_padding_rows_of_main_grad_stay_as_they_were() -> None:
    case = random_case(3, dtype=torch.float32)
    weight = torch.nn.Parameter(torch.nn.functional.pad(case.weight.detach(), (0, 0, 0, 3), value=9.0))
    weight.main_grad = torch.ones(weight.shape)
    policy_head(case.hidden, weight, case.inputs, VocabularyShard(0, 37), TERMS).loss.backward()
    assert (weight.main_grad[37:] == 1).all() and (weight.main_grad[:37] != 1).any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_added_without_a_backward_pass_to_come(variant: str) -> None:
    case = micro_batches(torch.float32, VARIANTS[variant])[0]
    case.weight.main_grad = torch.zeros(case.weight.shape)
    with torch.no_grad():
        output = case.run(TERMS)
    assert not output.loss.requires_grad and output.token_loss.any()
    with torch.inference_mode():
        case.run(TERMS)
    case.with_inputs(weights=None, scale=None, own_loss=None).run(TERMS)
    with pytest.raises(ValueError, match="needs reference_logprobs"):
        case.with_inputs(reference_logprobs=None).run(ALL_TERMS)
    assert not case.weight.main_grad.any() and not hasattr(case.weight, "grad_added_to_main_grad")


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_inside_a_recomputed_region_the_built_in_loss_is_an_error(use_reentrant: bool) -> None:
    case = micro_batches(torch.float32, None)[0]
    weight, states = case.weight, torch.randn(23, 8).requires_grad_()
    weight.main_grad = torch.zeros(weight.shape)

    def region(states: Tensor) -> Tensor:
        return Case(states.sin(), weight, case.inputs).run(TERMS).loss.exp()  # exp() saves its result: the head must run again

    loss = checkpoint(region, states, use_reentrant=use_reentrant)
    before = weight.main_grad.clone()
    with pytest.raises(RuntimeError, match=r"must not run inside a recomputed \(checkpointed\) region"):
        loss.backward()
    assert torch.equal(weight.main_grad, before)
    assert not (use_reentrant and before.any())  # its first pass runs without gradients


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_inside_a_recomputed_region_an_own_loss_adds_its_gradient_once(use_reentrant: bool) -> None:
    case = micro_batches(torch.float32, VARIANTS["own loss"])[0]
    case.weight.main_grad = torch.zeros(case.weight.shape)
    loss = checkpoint(lambda states: Case(states, case.weight, case.inputs).run(TERMS).loss * 1.0, case.hidden, use_reentrant=use_reentrant)
    backward(loss * 0.5, case.weight)
    assert relative_error(case.weight.main_grad, d_weight(case)) < 1e-5


# --- with megatron-core's DistributedDataParallel -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    choose_backend("cpu")
    distributed.init_process_group()
    destroy_parallel()  # what another test of this process left
    parallel_state.initialize_model_parallel()
    yield
    destroy_parallel()
    distributed.destroy()


class TinyModel(torch.nn.Module):
    """Words looked up in an embedding, a linear layer, the head; `tied`: the embedding is the head's weight."""

    def __init__(self, dtype: torch.dtype, *, tied: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.head = torch.nn.Parameter(torch.randn(37, 8, generator=generator).to(dtype))
        self.body = torch.nn.Parameter(torch.randn(8, 8, generator=generator).to(dtype) / 3)
        self.embedding = self.head if tied else torch.nn.Parameter(torch.randn(37, 8, generator=generator).to(dtype))
        if tied:
            self.head.zero_out_wgrad = True

    def forward(self, words: Tensor, inputs: HeadInputs) -> Tensor:
        hidden = torch.nn.functional.embedding(words, self.embedding) @ self.body
        return policy_head(hidden, self.head, inputs, VocabularyShard(0, 37), TERMS, HeadOptions(chunk=5)).loss


def exact_gradients(model: TinyModel, batches: list[tuple[Tensor, HeadInputs]]) -> dict[str, Tensor]:
    """By name, over all batches, in float64."""
    weights = {name: parameter.detach().double().requires_grad_() for name, parameter in model.named_parameters()}
    total = torch.zeros((), dtype=torch.float64)
    for words, inputs in batches:
        hidden = torch.nn.functional.embedding(words, weights.get("embedding", weights["head"])) @ weights["body"]
        exact = HeadInputs(inputs.targets, inputs.weights.double(), inputs.scale.double(), own_loss=inputs.own_loss)
        total = total + policy_head(hidden, weights["head"], exact, VocabularyShard(0, 37), TERMS).loss
    total.backward()
    return {name: weight.grad for name, weight in weights.items()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no overlap"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("one_rank")
def test_data_parallel_hooks_count_every_gradient_once(dtype: torch.dtype, tied: bool, overlap: bool, variant: str) -> None:
    model = TinyModel(dtype, tied=tied)
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=overlap)
    wrapped = DistributedDataParallel(TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1), settings, model)
    batches = []
    for seed in (1, 2):
        inputs = random_case(seed, dtype=torch.float32, on_policy=True, own_loss=VARIANTS[variant]).inputs
        batches.append((torch.randint(37, (23,), generator=torch.Generator().manual_seed(seed)), inputs))
    for _ in range(2):  # the second step starts from flags and gradients that the first left
        wrapped.zero_grad_buffer()
        with wrapped.no_sync():
            wrapped(*batches[0]).backward()
        wrapped(*batches[1]).backward()
        wrapped.finish_grad_sync()
    for name, want in exact_gradients(model, batches).items():
        parameter = model.get_parameter(name)
        assert parameter.grad is None
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # a bf16 model rounds its hidden states; a gradient lost or doubled is 1
        assert relative_error(parameter.main_grad, want) < tolerance, name
