"""Imported checkpoints are what megatron-core saves of the same model, and train alike at every layout."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.conversion_cases import LAYOUTS, layouts_of
from tests.distributed.launcher import run_cases
from tests.tiny_models import LLAMA3_ROPE, write_tiny_model

MODELS: dict[str, dict[str, Any]] = {
    "llama_rope_untied": {"family": "llama", "tied": False, "rope_parameters": LLAMA3_ROPE},
    "qwen2_tied": {"family": "qwen2", "tied": True},
    "qwen3_untied": {"family": "qwen3", "tied": False},
    "qwen3_moe_untied": {"family": "qwen3_moe", "tied": False},
}
CASES = [f"{layout}/{model}" for model in MODELS for layouts in layouts_of(model).values() for layout in layouts]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The larger world starts last and reads what the smaller one trained."""
    folder = tmp_path_factory.mktemp("conversion")
    for name, fields in MODELS.items():
        write_tiny_model(folder / "models" / name, **fields)
    found: dict[str, Any] = {}
    for world in sorted(LAYOUTS):
        found |= run_cases("tests.distributed.conversion_cases", world, [folder / "models", folder / "out"], timeout_s=900)
    return found


@pytest.mark.parametrize("case", CASES)
def test_an_import_is_what_megatron_core_saves_at_that_layout(results: dict[str, Any], case: str) -> None:
    """Keys, dimensions, dtypes, the pieces' places and all values: loading at the layout needs no resharding."""
    assert results[case]["same_index"] and results[case]["same_values"]


@pytest.mark.parametrize("case", CASES)
def test_a_step_from_an_import_of_another_layout_is_a_step_from_hugging_face(results: dict[str, Any], case: str) -> None:
    assert results[case]["trained"] and results[case]["loaded_equal"] and results[case]["step_equal"]


@pytest.mark.parametrize("case", CASES)
def test_what_was_trained_reloads_at_another_layout(results: dict[str, Any], case: str) -> None:
    assert results[case]["reloaded"] and all(results[case]["reloaded"].values())
