"""Every layout computes Hugging Face's logits and gives back, bit for bit, the weights that it was loaded with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_nsr.models.hf_config import read_model_shape
from megatron_nsr.weights.loading import random_hf_tensors
from tests.distributed.launcher import run_cases
from tests.distributed.parity_cases import LAYOUTS, LENGTHS, tokens_of
from tests.tiny_models import LLAMA3_ROPE, packed_logits, write_tiny_model

MODELS: dict[str, dict[str, Any]] = {
    "qwen2_tied": {"family": "qwen2", "tied": True},
    "qwen3_tied": {"family": "qwen3", "tied": True},
    "qwen3_untied": {"family": "qwen3", "tied": False},
    "llama_untied": {"family": "llama", "tied": False, "rope_parameters": LLAMA3_ROPE},
}
WORLDS = sorted(LAYOUTS)
CASES = [f"{layout}/{model}" for world in WORLDS for layout in LAYOUTS[world] for model in MODELS]


# What each sharded megatron-core weight is made of.
GRADIENTS = {
    "linear_qkv.weight": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
    "linear_proj.weight": ("o_proj.weight",),
    "linear_fc1.weight": ("gate_proj.weight", "up_proj.weight"),
    "linear_fc2.weight": ("down_proj.weight",),
}


def reference(folder: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """Writes a model with HF's logits beside it; returns HF's gradient norms and the sums of the random weights of that shape."""
    model = write_tiny_model(folder, **fields)
    logits = [packed_logits(model, lengths, tokens_of(lengths, model.config.vocab_size)) for lengths in LENGTHS]
    torch.save([x.detach() for x in logits], folder / "logits.pt")
    torch.stack([x.square().sum() for x in logits]).sum().backward()
    squares = {
        kind: sum(float(p.grad.double().square().sum()) for name, p in model.named_parameters() if name.endswith(parts))
        for kind, parts in GRADIENTS.items()
    }
    drawn = random_hf_tensors(read_model_shape(str(folder)), seed=7)
    return {
        "gradients": {kind: square**0.5 for kind, square in squares.items()},
        "random_sums": {name: float(drawn[name].double().sum()) for name in drawn},
    }


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    models = tmp_path_factory.mktemp("models")
    return {"folder": models} | {name: reference(models / name, fields) for name, fields in MODELS.items()}


@pytest.fixture(scope="module")
def results(references: dict[str, Any]) -> dict[str, Any]:
    """One torchrun start for each world size, with all its cases."""
    found: dict[str, Any] = {}
    for world in WORLDS:
        found |= run_cases("tests.distributed.parity_cases", world, [references["folder"]])
    return found


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_those_of_hugging_face(results: dict[str, Any], references: dict[str, Any], case: str) -> None:
    assert results[case]["micro_batches_compared"] == len(LENGTHS)
    assert results[case]["logit_error"] < 1e-4
    assert results[case]["padding"] == 0.0
    assert results[case]["gradients"] == pytest.approx(references[case.split("/")[1]]["gradients"], rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_gathered_weights_are_the_loaded_ones_on_every_rank(results: dict[str, Any], case: str) -> None:
    assert results[case]["gathered_equal"]


@pytest.mark.parametrize("case", CASES)
def test_at_most_two_buckets_are_alive_and_the_next_one_is_always_on_its_way(results: dict[str, Any], case: str) -> None:
    for alive, ahead, buckets in results[case]["buffers"]:
        assert buckets > 4
        # a rank that has the whole model needs no buffer
        assert (alive, ahead) == ((0, -buckets + 1) if case.startswith("dp") else (2, 1))


@pytest.mark.parametrize("case", CASES)
def test_checksums_of_the_shards_are_those_of_the_whole_tensors(results: dict[str, Any], case: str) -> None:
    assert results[case]["checksums_equal"]


@pytest.mark.parametrize("case", CASES)
def test_random_weights_do_not_depend_on_the_layout(results: dict[str, Any], references: dict[str, Any], case: str) -> None:
    assert results[case]["random_equal_on_ranks"]
    assert results[case]["random_sums"] == references[case.split("/")[1]]["random_sums"]
