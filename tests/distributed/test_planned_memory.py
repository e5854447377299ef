"""The planner's memory against measured bytes of live tensors: a model of 50 million parameters on two ranks, by part and layout."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.launcher import run_cases
from tests.distributed.memory_cases import LAYOUTS
from tests.tiny_models import tiny_config

PARTS = ("weights", "gradients", "optimizer", "activations", "peak")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    model = tmp_path_factory.mktemp("memory") / "model"
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    config = tiny_config("qwen3", tied=False, vocab_size=24000, layers=8, **shape)
    config.save_pretrained(model)
    return run_cases("tests.distributed.memory_cases", 2, [model], timeout_s=600)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_planned_part_is_within_a_tenth_of_what_lives(results: dict[str, Any], layout: str, part: str) -> None:
    for rank in results[layout]:
        assert rank["planned"][part] == pytest.approx(rank["measured"][part], rel=0.1)
