"""The training command on a mixture of experts: vLLM samples from pushed experts, on one process and with experts on two."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from megatron_nsr.observability.run_directory import RunDirectory
from tests.integration.small_run import Small, finished, start, values
from tests.integration.test_layouts_end_to_end import COMPARED

EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,  # no multiple of the 32 that vLLM's kernel takes, so that it pads
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def model(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's model and tokenizer, with experts, without weights."""
    path = tmp_path_factory.mktemp("experts") / "model"
    shutil.copytree(small.model, path)
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | EXPERTS))
    return path


LAYOUTS = {
    "one": (1, ()),
    "experts": (2, ("parallel.expert=2",)),
    "engine_on_both": (2, ("parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2", "rollout.tensor_parallel=2")),
}


def test_rollouts_follow_the_policy_and_experts_on_two_processes_give_the_numbers_of_one(small: Small, model: Path, tmp_path: Path) -> None:
    overrides = ("run.steps=2", f"model.path={model}", "model.initialization=random", "objective.router_aux_loss=0.01")
    overrides += ("rollout.verify_push=always", "checkpoint.keep=1")
    for name, (ranks, layout) in LAYOUTS.items():
        finished(start(small.nsr(tmp_path / name, *overrides, *layout), tmp_path / f"{name}.log", ranks=ranks), 0)
    one = values(tmp_path / "one")
    # an update was pushed before the second step, whose rollouts show whether the engine took it
    assert one[0]["policy/updates"] > 0 and [step["rollout/weight_version"] for step in one] == [0, 1]
    for layout in LAYOUTS:
        for got, want in zip(values(tmp_path / layout), one, strict=True):
            assert 0 < got["rollout/logprob_gap_max"] < 1e-4
            for name in (*COMPARED, "policy/aux_loss"):
                assert got[name] == pytest.approx(want[name], rel=1e-3, abs=1e-6), name
    exported, loading = transformers.AutoModelForCausalLM.from_pretrained(
        RunDirectory(tmp_path / "experts").hf, output_loading_info=True, dtype=torch.float32
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert exported(torch.arange(8)[None]).logits.isfinite().all()


def test_what_only_experts_have_is_refused_for_a_dense_model(small: Small, tmp_path: Path) -> None:
    log = finished(start(small.nsr(tmp_path / "run", "objective.router_aux_loss=0.01"), tmp_path / "log"), 2)
    assert "objective.router_aux_loss=0.01: the model has no experts; it must be 0" in log
