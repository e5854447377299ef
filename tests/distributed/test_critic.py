"""PPO's critic and policy at every parallel layout equal those of one rank, and their checkpoints lose nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_nsr.platform import distributed
from tests.distributed.critic_cases import BF16, CASES, LAYOUTS, MOVES, MOVES_TO_ONE, SAVED, resume, run_layout
from tests.distributed.launcher import run_cases
from tests.distributed.test_training import close, identical
from tests.tiny_models import write_tiny_model

MODELS = {"tied": "qwen3", "untied": "qwen3", "experts": "qwen3_moe"}
COMPARED = ("loss", "grad_norm", "value_mean", "explained_variance")
POLICY = ("policy/loss", "policy/grad_norm", "policy/loss_psr", "policy/loss_nsr", "policy/entropy", "policy/logprob")
CONTINUED = [*MOVES, *MOVES_TO_ONE]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("critic")


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, Any]:
    """One start of torchrun for all layouts; one rank is this process."""
    for name, family in MODELS.items():
        write_tiny_model(out / "models" / name, family, tied=name == "tied")
    found = run_cases("tests.distributed.critic_cases", 4, [out / "models", out], timeout_s=900)
    distributed.init_process_group()
    for name in MODELS:
        found[f"one/{name}"] = run_layout(out / "models" / name, {}, out / "one" / name)
    for case, layout in MOVES_TO_ONE:
        model, weights = out / "models" / case.split("/")[1], out / case / f"at_{layout}.pt"
        found[f"{case}-{layout}"] = resume(model, LAYOUTS[layout], out / case, weights)
    return found


def same(got: dict[str, float], want: dict[str, float]) -> None:
    assert got.keys() == want.keys()
    for name in (*(f"critic/{name}" for name in COMPARED), *POLICY):
        assert got[name] == pytest.approx(want[name], rel=1e-4, abs=1e-6), name
    assert got["critic/clip_ratio"] == pytest.approx(want["critic/clip_ratio"], abs=0.03)  # a token at the very edge may fall either way


@pytest.mark.parametrize("case", CASES)
def test_a_layout_learns_what_one_rank_learns(results: dict[str, Any], out: Path, case: str) -> None:
    reference = f"one/{case.split('/')[1]}"
    for got, want in zip(results[case]["metrics"], results[reference]["metrics"], strict=True):
        same(got, want)
    close(torch.load(out / case / "weights.pt"), torch.load(out / reference / "weights.pt"))


def test_the_cases_exercise_what_they_claim(results: dict[str, Any], out: Path) -> None:
    first, second = results["one/tied"]["metrics"]
    assert first["critic/value_mean"] == 0 and second["critic/value_mean"] != 0
    assert first["critic/clip_ratio"] > 0 and first["policy/clip_fraction_psr"] > 0
    assert first["policy/loss_psr"] < 0 < first["policy/loss_nsr"]
    weights = torch.load(out / "one" / "tied" / "weights.pt")
    assert weights["value_head"].any() and not torch.equal(weights["model.norm.weight"], weights["policy.model.norm.weight"])


@pytest.mark.parametrize("case", ["one/tied", "one/untied", *SAVED, *(f"bf16/{case}" for case in BF16)])
def test_a_resumed_step_is_the_undisturbed_one_bit_for_bit(results: dict[str, Any], out: Path, case: str) -> None:
    assert results[case]["resumed"] == results[case]["third"]
    assert identical(out / case / "resumed.pt", out / case / "third.pt")
    assert not identical(out / case / "third.pt", out / case / "weights.pt")


@pytest.mark.parametrize(("case", "layout"), CONTINUED)
def test_a_checkpoint_continues_at_another_layout(results: dict[str, Any], out: Path, case: str, layout: str) -> None:
    undisturbed = f"one/{case.split('/')[1]}"
    same(results[f"{case}-{layout}"], results[undisturbed]["third"])
    close(torch.load(out / case / f"at_{layout}.pt"), torch.load(out / undisturbed / "third.pt"))
