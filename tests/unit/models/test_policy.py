"""The policy on one rank against Hugging Face's implementation of the same model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_nsr.config import ParallelConfig
from megatron_nsr.models.backends import Backend, choose_backend
from megatron_nsr.models.hf_config import ModelShape, read_model_shape
from megatron_nsr.models.parallel import destroy_parallel, initialize_parallel
from megatron_nsr.models.policy import PolicyModel, build_policy, padded_vocab_size, transformer_config
from megatron_nsr.platform import distributed
from megatron_nsr.types import UserError
from megatron_nsr.weights.gathering import gather_hf_tensors
from megatron_nsr.weights.loading import load_hf_weights, random_hf_tensors
from megatron_nsr.weights.safetensors_files import SafetensorsDirectory
from tests.tiny_models import LLAMA3_ROPE, packed_logits, tiny_config, write_tiny_model

LENGTHS = [7, 1, 40, 16]


def logits_head(hidden: torch.Tensor, weight: torch.Tensor, labels: Any) -> torch.Tensor:
    return hidden @ weight.T


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    distributed.init_process_group()
    yield choose_backend("cpu")
    destroy_parallel()
    distributed.destroy()


def build(path: Path, backend: Backend, **options: Any) -> tuple[ModelShape, list[PolicyModel]]:
    shape = read_model_shape(str(path))
    initialize_parallel(ParallelConfig(), shape, 1, seed=0)
    values = {"dtype": torch.float32, "recompute": "none", "head": logits_head} | options
    return shape, build_policy(shape, ParallelConfig(), backend=backend, **values)


def run(chunk: PolicyModel, backend: Backend, tokens: torch.Tensor, labels: Any = None) -> Any:
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    packing = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=max(LENGTHS), max_seqlen_kv=max(LENGTHS)
    )
    with backend.phase():
        return chunk(tokens[None], torch.zeros_like(tokens)[None], None, labels=labels, packed_seq_params=packing)


def some_tokens(vocab_size: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (sum(LENGTHS),), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "llama3_rope", "qwen3_moe"])
def test_logits_of_packed_sequences_equal_those_of_hugging_face(tmp_path: Path, backend: Backend, family: str, tied: bool) -> None:
    rope = {"rope_parameters": LLAMA3_ROPE} if family == "llama3_rope" else {}
    model = write_tiny_model(tmp_path, family.partition("3_rope")[0], tied=tied, layers=2, **rope)
    shape, chunks = build(tmp_path, backend)
    with SafetensorsDirectory(str(tmp_path)) as files:
        load_hf_weights(chunks, shape, files)
        gathered = {name: tensor.clone() for name, tensor in gather_hf_tensors(chunks, shape, bucket_bytes=30_000)}
        assert gathered.keys() == files.keys()
        assert all(torch.equal(gathered[name], files[name]) for name in files)
    tokens = some_tokens(shape.vocab_size)
    with torch.no_grad():
        expected = packed_logits(model, LENGTHS, tokens)
        assert expected.std() > 0.3
        assert (run(chunks[0], backend, tokens) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_gathered_tensors_keep_their_values_when_the_model_moves_on(tmp_path: Path, backend: Backend, family: str) -> None:
    write_tiny_model(tmp_path, family, tied=False, layers=1)
    shape, chunks = build(tmp_path, backend)
    with SafetensorsDirectory(str(tmp_path)) as files, torch.no_grad():
        load_hf_weights(chunks, shape, files)
        gathered = dict(gather_hf_tensors(chunks, shape, bucket_bytes=30_000))
        for parameter in chunks[0].parameters():
            parameter.fill_(7)
        assert all(torch.equal(gathered[name], files[name]) for name in files)


def test_scaled_rope_changes_the_logits(tmp_path: Path, backend: Backend) -> None:
    """Guards the test above: with these lengths the scaling is visible."""
    scaled = write_tiny_model(tmp_path / "scaled", "llama", tied=False, layers=2, rope_parameters=LLAMA3_ROPE)
    plain = write_tiny_model(tmp_path / "plain", "llama", tied=False, layers=2)
    with torch.no_grad():
        assert (packed_logits(scaled, LENGTHS, some_tokens(101)) - packed_logits(plain, LENGTHS, some_tokens(101))).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_leaves_gradients_as_they_are(tmp_path: Path, backend: Backend, recompute: str, family: str) -> None:
    tiny_config(family, tied=True, layers=2).save_pretrained(tmp_path)
    gradients = []
    for choice in ("none", recompute):
        shape, chunks = build(tmp_path, backend, recompute=choice)
        load_hf_weights(chunks, shape, random_hf_tensors(shape, seed=1))
        output = run(chunks[0], backend, some_tokens(shape.vocab_size))
        with backend.phase():
            output.square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in chunks[0].named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_the_head_gets_the_callers_labels_and_its_result_comes_back(tmp_path: Path, backend: Backend) -> None:
    tiny_config("llama", tied=False, layers=2).save_pretrained(tmp_path)
    _, chunks = build(tmp_path, backend, head=lambda hidden, weight, labels: (hidden.shape, weight.shape, labels))
    labels = object()
    assert run(chunks[0], backend, some_tokens(101), labels) == ((sum(LENGTHS), 64), (101, 64), labels)


def test_bfloat16_parameters_come_back_as_bfloat16(tmp_path: Path, backend: Backend) -> None:
    tiny_config("qwen2", tied=False, layers=2).save_pretrained(tmp_path)
    shape, chunks = build(tmp_path, backend, dtype=torch.bfloat16)
    drawn = random_hf_tensors(shape, seed=2)
    load_hf_weights(chunks, shape, drawn)
    assert run(chunks[0], backend, some_tokens(shape.vocab_size)).dtype == torch.bfloat16
    for name, tensor in gather_hf_tensors(chunks, shape, bucket_bytes=1 << 20):
        assert torch.equal(tensor, drawn[name].bfloat16())


def test_building_leaves_the_global_random_state_alone(tmp_path: Path, backend: Backend) -> None:
    tiny_config("qwen3", tied=True, layers=2).save_pretrained(tmp_path)
    before = torch.get_rng_state()
    build(tmp_path, backend)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("vocab_size", "tensor", "padded"), [(101, 1, 101), (101, 2, 102), (101, 4, 104), (128, 4, 128)])
def test_vocabulary_is_padded_to_the_tensor_parallel_ranks(vocab_size: int, tensor: int, padded: int) -> None:
    assert padded_vocab_size(vocab_size, tensor) == padded


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without CUDA")
def test_te_without_cuda_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.backend='te': torch sees no CUDA device; use cpu or auto"):
        choose_backend("te")


def test_te_has_no_attention_in_float32_over_context_parallel_ranks(
    tmp_path: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_model(tmp_path, "qwen3", tied=False)
    shape = read_model_shape(str(tmp_path))
    monkeypatch.setattr(backend, "name", "te")
    for dtype, context in ((torch.float32, 1), (torch.bfloat16, 2)):
        transformer_config(shape, ParallelConfig(context=context), dtype=dtype, backend=backend, recompute="none")
    with pytest.raises(UserError, match=r"^model\.dtype=float32: Transformer Engine has no attention for it with parallel\.context=2"):
        transformer_config(shape, ParallelConfig(context=2), dtype=torch.float32, backend=backend, recompute="none")


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_wrong_weights_are_named(tmp_path: Path, backend: Backend, change: str) -> None:
    tiny_config("qwen3", tied=False, layers=2).save_pretrained(tmp_path)
    shape, chunks = build(tmp_path, backend)
    weights = dict(random_hf_tensors(shape, seed=0))
    if change == "missing":
        del weights["model.layers.1.self_attn.q_norm.weight"]
        message = r"no tensor model\.layers\.1\.self_attn\.q_norm\.weight, which this qwen3 model needs"
    elif change == "extra":
        weights["model.layers.2.mlp.up_proj.weight"] = torch.zeros(96, 64)
        message = r"tensor model\.layers\.2\.mlp\.up_proj\.weight is no part of a qwen3 model of 2 layers"
    else:
        weights["lm_head.weight"] = torch.zeros(100, 64)
        message = r"tensor lm_head\.weight has shape \(100, 64\), config\.json asks for \(101, 64\)"
    with pytest.raises(UserError, match=message):
        load_hf_weights(chunks, shape, weights)


def test_a_parameter_that_no_tensor_fills_is_named(tmp_path: Path, backend: Backend) -> None:
    tiny_config("qwen3", tied=False, layers=2).save_pretrained(tmp_path)
    shape, chunks = build(tmp_path, backend)
    chunks[0].register_parameter("value_head", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(RuntimeError, match="no Hugging Face tensor fills value_head"):
        load_hf_weights(chunks, shape, random_hf_tensors(shape, seed=0))
