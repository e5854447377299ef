"""The load-balancing loss by sequence, and the gradients of a mixture of experts against Hugging Face's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_nsr.config import ParallelConfig
from megatron_nsr.models.backends import Backend, choose_backend
from megatron_nsr.models.expert_routing import BalancedPacking, LoadBalancing, load_balancing_losses, sum_by_sequence
from megatron_nsr.models.hf_config import read_model_shape
from megatron_nsr.models.parallel import destroy_parallel, initialize_parallel
from megatron_nsr.models.policy import PolicyModel, build_policy
from megatron_nsr.platform import distributed
from megatron_nsr.weights.loading import load_hf_weights
from megatron_nsr.weights.mapping import chunk_entries
from megatron_nsr.weights.safetensors_files import SafetensorsDirectory
from tests.tiny_models import write_tiny_model

LENGTHS = (5, 9, 2)


def loss_of(scores: Tensor, chosen: Tensor) -> Tensor:
    sequences, lengths = torch.zeros(len(scores), dtype=torch.int64), torch.tensor([len(scores)])
    sums = (sum_by_sequence(values, sequences, 1) for values in (scores, chosen))
    return load_balancing_losses(*sums, lengths, experts_per_token=int(chosen[0].sum()))[0]


def test_the_loss_is_one_where_experts_are_used_evenly_and_their_number_where_one_does_it_all() -> None:
    even = torch.eye(4)
    assert loss_of(torch.full((4, 4), 0.25), even) == pytest.approx(1.0)
    alone = torch.zeros(6, 4)
    alone[:, 2] = 1
    assert loss_of(alone, alone) == pytest.approx(4.0)


def test_packing_does_not_change_a_sequence_s_loss() -> None:
    scores = torch.rand(sum(LENGTHS), 8).softmax(dim=1)
    chosen = torch.zeros_like(scores).scatter(1, scores.topk(2, dim=1).indices, 1)
    sequences = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
    sums = (sum_by_sequence(values, sequences, 3) for values in (scores, chosen))
    packed = load_balancing_losses(*sums, torch.tensor(LENGTHS), 2)
    alone = [loss_of(*pair) for pair in zip(scores.split(LENGTHS), chosen.split(LENGTHS), strict=True)]
    torch.testing.assert_close(packed, torch.stack(alone))


@pytest.fixture(scope="module")
def backend() -> Any:
    distributed.init_process_group()
    yield choose_backend("cpu")
    destroy_parallel()
    distributed.destroy()


def build(path: Path, backend: Backend) -> PolicyModel:
    shape = read_model_shape(str(path))
    initialize_parallel(ParallelConfig(), shape, 1, seed=0)

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(hidden @ weight.T, targets)

    (chunk,) = build_policy(shape, ParallelConfig(), dtype=torch.float32, recompute="none", head=head, backend=backend)
    with SafetensorsDirectory(str(path)) as files:
        load_hf_weights([chunk], shape, files)
    return chunk


def backward(chunk: PolicyModel, backend: Backend, tokens: Tensor, targets: Tensor, balancing: LoadBalancing | None = None) -> None:
    lengths = torch.tensor([0, len(tokens)], dtype=torch.int32)
    packing = BalancedPacking(
        qkv_format="thd", cu_seqlens_q=lengths, cu_seqlens_kv=lengths, max_seqlen_q=len(tokens), max_seqlen_kv=len(tokens),
        balancing=balancing,
    )  # fmt: skip
    with backend.phase():
        chunk(tokens[None], torch.zeros_like(tokens)[None], None, labels=targets, packed_seq_params=packing).backward()


@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_equal_those_of_hugging_face_in_float64(tmp_path: Path, backend: Backend, normalize: bool) -> None:
    model = write_tiny_model(tmp_path, "qwen3_moe", tied=False, layers=2, norm_topk_prob=normalize).double()
    model.set_experts_implementation("eager")  # the grouped products know no float64
    tokens, targets = torch.randint(0, 101, (2, 40), generator=torch.Generator().manual_seed(3))
    cross_entropy(model(tokens[None]).logits[0], targets).backward()
    chunk = build(tmp_path, backend)
    backward(chunk, backend, tokens, targets)
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    shape = read_model_shape(str(tmp_path))
    compared = 0
    for _, entry, _, parameter in chunk_entries([chunk], shape):
        if entry.expert is not None:
            fused = wanted[f"{entry.hf[0].split('experts')[0]}experts.{'gate_up' if len(entry.hf) == 2 else 'down'}_proj"]
            expected = fused[entry.expert]
        else:
            expected = entry.layout.split([wanted[name] for name in entry.hf], 0, 1, shape)
        error = (parameter.grad.double() - expected).norm() / expected.norm().clamp_min(1e-12)
        assert error < 1e-4, (entry.hf, float(error))
        compared += 1
    assert compared == len(list(chunk.parameters()))


def test_the_load_balancing_gradient_reaches_the_routers_and_what_feeds_them_as_autograd_says(
    tmp_path: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer: there the loss depends on the router's weight directly, and the formula can be differentiated by hand."""
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", torch.ones(()))  # the schedule's, of whatever ran before
    write_tiny_model(tmp_path, "qwen3_moe", tied=False, layers=1)
    tokens, targets = torch.randint(0, 101, (2, 30), generator=torch.Generator().manual_seed(3))
    gradients, inputs = [], []
    balancing = LoadBalancing(torch.ones(1), torch.tensor([30]), torch.zeros(30, dtype=torch.int64), gradient=0.7)
    for choice in (None, balancing):
        chunk = build(tmp_path, backend)
        router = chunk.decoder.layers[0].mlp.router
        router.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
        backward(chunk, backend, tokens, targets, choice)
        gradients.append(router.weight.grad.clone())
    weight = router.weight.detach().clone().requires_grad_()
    scores = (inputs[1][:, 0] @ weight.T).softmax(dim=1)
    loss = loss_of(scores, torch.zeros_like(scores).scatter(1, scores.topk(2, dim=1).indices, 1))
    loss.backward()
    assert float(balancing.found[0]) == pytest.approx(float(loss.detach()), rel=1e-5)
    torch.testing.assert_close(gradients[1] - gradients[0], 0.7 * weight.grad, rtol=1e-3, atol=1e-6)
