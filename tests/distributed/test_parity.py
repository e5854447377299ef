"""Every layout computes Hugging Face's logits and gives back, bit for bit, the weights that it was loaded with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

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


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One torchrun start for each world size, with all its cases."""
    models = tmp_path_factory.mktemp("models")
    for name, fields in MODELS.items():
        model = write_tiny_model(models / name, **fields)
        batches = [(lengths, tokens_of(lengths, model.config.vocab_size)) for lengths in LENGTHS]
        torch.save([packed_logits(model, lengths, tokens) for lengths, tokens in batches], models / name / "logits.pt")
    found: dict[str, Any] = {}
    for world in WORLDS:
        found |= run_cases("tests.distributed.parity_cases", world, ["--models", str(Path(models))])
    return found


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_hugging_face(results: dict[str, Any], case: str) -> None:
    assert results[case]["micro_batches_compared"] == len(LENGTHS)
    assert results[case]["logit_error"] < 1e-4
    assert results[case]["padding"] == 0.0


@pytest.mark.parametrize("case", CASES)
def test_gathered_weights_are_the_loaded_ones_on_every_rank(results: dict[str, Any], case: str) -> None:
    assert results[case]["gathered_equal"]


@pytest.mark.parametrize("case", CASES)
def test_random_weights_and_gradients_do_not_depend_on_the_layout(results: dict[str, Any], case: str) -> None:
    one = results[f"one/{case.split('/')[1]}"]
    assert results[case]["random_equal_on_ranks"]
    assert results[case]["random_sums"] == one["random_sums"]
    assert results[case]["gradients"] == pytest.approx(one["gradients"], rel=1e-4)
