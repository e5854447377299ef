"""tools/push_plan.py: the plan of a config, and one line where the layout does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_models import tiny_config
from tools.push_plan import main

CONFIG = str(Path(__file__).parents[3] / "configs" / "quickstart.yaml")


@pytest.fixture
def model(tmp_path: Path) -> str:
    tiny_config("qwen2", tied=True).save_pretrained(tmp_path)
    return f"model.path={tmp_path}"


def test_a_configs_plan_is_printed_for_every_rank(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([CONFIG, model, "parallel.tensor=2", "parallel.pipeline=2", "model.dtype=bfloat16", "--ranks", "8"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    ranks = [line[0] for line in lines if line and line[0].isdigit() and line[1] != "buckets,"]
    assert ranks == ["8", *"01234567"]  # "8 ranks, one push", and each of them
    assert sum(line[0].startswith("model.") for line in lines if line) == 2  # a bucket a stage


def test_a_layout_that_does_not_fit_is_one_line_and_status_2(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([CONFIG, model, "parallel.tensor=3", "--ranks", "3"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "parallel.tensor=3 does not divide num_attention_heads=4\n"
