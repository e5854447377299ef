"""What the plan advises is valid and does what it says; its output can be read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from examples.quickstart.prepare import MODEL
from megatron_nsr.config_files import load_config
from megatron_nsr.planning.command import show_plan
from megatron_nsr.planning.report import number
from megatron_nsr.types import UserError

SCALE = Path(__file__).parents[3] / "configs" / "scale"


@pytest.mark.parametrize(
    ("file", "gpus", "gpu", "changes", "keys"),
    [
        ("qwen2.5_32b_4x8", 16, "h100", [], ["training.offload=all", "training.recompute=full"]),
        (
            "qwen2.5_7b_1x8",
            8,
            "h200",
            ["rollout.sleep_level=0", "training.offload=none"],
            ["rollout.sleep_level=2", "training.offload=optimizer"],
        ),
        ("qwen2.5_7b_1x8", 8, "h200", ["rollout.gpu_memory_utilization=0.12"], ["rollout.gpu_memory_utilization=0.14"]),
        ("qwen2.5_7b_1x8", 8, "h200", ["rollout.kv_cache_mib=100"], ["rollout.kv_cache_mib=448"]),
        ("qwen2.5_72b_8x8", 64, "h200", ["rollout.tensor_parallel=1"], ["rollout.tensor_parallel=2"]),
        ("llama3.1_405b_64x8", 512, "h200", ["rollout.gpu_memory_utilization=0.7"], ["rollout.gpu_memory_utilization=0.71"]),
        ("qwen2.5_72b_8x8", 8, "h200", [], None),  # on 16 GPUs with recomputation
        ("qwen2.5_7b_1x8", 2, "h100", ["rollout.sleep_level=0", "objective.name=ppo"], None),
    ],
)
def test_what_would_make_a_config_fit_does(
    file: str, gpus: int, gpu: str, changes: list[str], keys: list[str] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    def plan(*more: str, on: int = gpus) -> dict[str, Any]:
        show_plan(load_config(SCALE / f"{file}.yaml", [*changes, *more]), gpus=on, gpu=gpu, as_json=True)
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    bad = plan()
    remedies = bad["remedies"]
    assert not bad["fits"] and remedies["keys"] == keys
    if keys:
        assert plan(*keys)["fits"]
        for index in range(len(keys)):  # each of them is needed
            assert not plan(*keys[:index], *keys[index + 1 :])["fits"]
    if (more := remedies["more_gpus"]) is not None:
        assert plan(*remedies["more_gpus_keys"], on=more)["fits"] and not plan(*remedies["more_gpus_keys"], on=more // 2)["fits"]
    for one in bad["suggestions"]:
        good = plan(*one["overrides"])
        assert good["fits"] and good["layout"] == one["layout"] and good["memory"]["peak"] == one["peak"]


def test_an_engine_that_does_not_divide_the_heads_is_refused() -> None:
    with pytest.raises(UserError, match=r"rollout\.tensor_parallel=8 does not divide num_attention_heads=28"):
        show_plan(load_config(SCALE / "qwen2.5_7b_1x8.yaml", ["rollout.tensor_parallel=8"]), gpus=8, gpu="h200")


@pytest.mark.parametrize("file", ["quickstart.yaml", *(f"scale/{path.name}" for path in SCALE.glob("*x8.yaml"))])
def test_pasted_after_the_config_the_keys_of_each_suggestion_give_it(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = re.search(r"(\d+)x8", file)
    gpus = 8 * int(nodes[1]) if nodes else 8
    (tmp_path / "config.json").write_text(json.dumps(MODEL | {"vocab_size": 64}))
    own = [] if nodes else [f"model.path={tmp_path}"]

    def plan(*more: str) -> dict[str, Any]:
        show_plan(load_config(SCALE.parent / file, [*own, *more]), gpus=gpus, gpu="H200", as_json=True)
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    asked = plan()
    assert len(asked["suggestions"]) == 3
    show_plan(load_config(SCALE.parent / file, own), gpus=gpus, gpu="h200")
    lines = capsys.readouterr().out.splitlines()
    fastest = min(without_sampling(asked), *(one["seconds_without_sampling"] for one in asked["suggestions"]))
    assert asked["suggestions"][0]["seconds_without_sampling"] <= 1.01 * fastest
    for one in asked["suggestions"]:
        good = plan(*one["overrides"])
        assert good["fits"] and (good["layout"], good["data_parallel"]) == (one["layout"], one["data_parallel"])
        assert without_sampling(good) == pytest.approx(one["seconds_without_sampling"])
        keys = " ".join(one["overrides"]) or "(this config)"
        assert any(line.endswith(f"  {keys}") for line in lines)


def without_sampling(plan: dict[str, Any]) -> float:
    return float(sum(phase["seconds"] for name, phase in plan["phases"].items() if name != "rollout"))


def test_a_number_of_gpus_that_cannot_be_is_answered_with_the_next_ones() -> None:
    with pytest.raises(UserError, match=r"--gpus 513: the servers take 176, the trainer 337, .* a multiple of 56; give 512 or 568"):
        show_plan(load_config(SCALE / "llama3.1_405b_64x8.yaml"), gpus=513, gpu="h200")
    with pytest.raises(UserError, match=r"--gpus 3: all of them train, .*parallel\.tensor=4 .* a multiple of 4; give 4$"):
        show_plan(load_config(SCALE / "qwen2.5_72b_8x8.yaml", ["parallel.pipeline=1"]), gpus=3, gpu="h200")


def test_fields_that_tie_the_layout_are_kept_in_suggestions(capsys: pytest.CaptureFixture[str]) -> None:
    fields = ["training.recompute=selective", "model.transformer={recompute_modules: [mlp, layernorm]}"]
    show_plan(load_config(SCALE / "qwen2.5_72b_8x8.yaml", fields), gpus=64, gpu="h200", as_json=True)
    plan = json.loads(capsys.readouterr().out)
    assert plan["not_planned"] == ["model.transformer.recompute_modules=['mlp', 'layernorm']"]
    assert plan["suggestions"] and all("training.recompute=selective" in one["layout"] for one in plan["suggestions"])


def test_a_reader_is_told_what_does_not_fit_what_would_and_what_was_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(SCALE / "qwen2.5_32b_4x8.yaml", ["logging.probe_every=5"])
    assert not show_plan(config, gpus=16, gpu="h100")
    printed = capsys.readouterr().out
    assert "does not fit: 50.6 GiB over 79 GiB at the update on pipeline stage 0, because of activations 56.5" in printed
    assert "it would fit with: training.offload=all training.recompute=full\n" in printed
    assert "not in these numbers: logging.probe_every=5\n" in printed
    assert "(this config, which does not fit)" in printed and "e+0" not in printed


def test_a_small_model_on_a_laptop_is_planned_in_units_of_its_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL | {"vocab_size": 64}))
    assert show_plan(load_config(SCALE.parent / "quickstart.yaml", [f"model.path={tmp_path}"]), gpus=2, gpu="cpu")
    printed = capsys.readouterr().out
    assert "million parameters" in printed and "memory of one process, MiB" in printed and "GFLOP" in printed and "MB" in printed
    assert "GPU" not in printed and "e-0" not in printed


@pytest.mark.parametrize(
    ("value", "text"), [(0.05123, "0.0512"), (5.118, "5.12"), (99.4, "99.4"), (5118.3, "5,118"), (1.06e9, "1,060,000,000")]
)
def test_numbers_have_no_exponent(value: float, text: str) -> None:
    assert number(value) == text
