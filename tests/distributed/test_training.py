"""Updates at every parallel layout equal those of one rank, and a checkpoint loses nothing, at the same layout or another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launcher import run_cases
from tests.distributed.training_cases import LAYOUTS
from tests.tiny_models import write_tiny_model

PARALLEL = [f"{layout}/{model}" for world in LAYOUTS for layout in LAYOUTS[world] if layout != "one" for model in ("tied", "untied")]
EVERY = ["one/tied", "one/untied", *PARALLEL]
# Log-prob gaps are against random numbers here; they follow from the log-probs that are compared.
COMPARED = ("policy/loss", "policy/grad_norm", "policy/entropy", "policy/logprob", "rollout/correction_mean")
BY_SIGN = ("policy/loss", "policy/entropy", "policy/logprob", "policy/grad_norm_head")
PROBED = ("policy/grad_norm_psr", "policy/grad_norm_nsr", "policy/grad_cosine")  # every second step
CLIPPED = ("policy/clip_fraction_psr", "policy/clip_fraction_nsr")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, Any]:
    """One torchrun start for each world size; the larger worlds also continue the checkpoint of one rank."""
    for name in ("tied", "untied"):
        write_tiny_model(out / "models" / name, "qwen3", tied=name == "tied")
    found: dict[str, Any] = {}
    for world in LAYOUTS:
        extra = ["--resume", "one"] if world > 1 else []
        found |= run_cases("tests.distributed.training_cases", world, ["--models", str(out / "models"), "--out", str(out), *extra])
    return found


def same(got: dict[str, float], want: dict[str, float], rel: float = 1e-4) -> None:
    assert got.keys() == want.keys()
    probed = [name for name in PROBED if name in want]
    for name in (*COMPARED, *(f"{name}_{sign}" for name in BY_SIGN for sign in ("psr", "nsr")), *probed):
        assert got[name] == pytest.approx(want[name], rel=rel, abs=1e-6), name
    for name in CLIPPED:  # a token at the very edge may fall either way
        assert got[name] == pytest.approx(want[name], abs=0.03), name


@pytest.mark.parametrize("case", PARALLEL)
def test_losses_and_gradient_norms_equal_those_of_one_rank(results: dict[str, Any], case: str) -> None:
    reference = results[f"one/{case.split('/')[1]}"]
    for got, want in zip(results[case]["metrics"], reference["metrics"], strict=True):
        same(got, want)


@pytest.mark.parametrize("case", PARALLEL)
def test_updated_weights_equal_those_of_one_rank(results: dict[str, Any], out: Path, case: str) -> None:
    weights = torch.load(out / case / "weights.pt")
    reference = torch.load(out / "one" / case.split("/")[1] / "weights.pt")
    assert weights.keys() == reference.keys()
    for name, tensor in weights.items():
        assert (tensor - reference[name]).norm() <= 1e-4 * reference[name].norm(), name


def test_the_cases_exercise_what_they_claim(results: dict[str, Any], out: Path) -> None:
    first, second = results["one/tied"]["metrics"]
    assert first["policy/updates"] == 2 and second["policy/updates"] == 1
    assert first["policy/clip_fraction_psr"] > 0 and first["policy/clip_fraction_nsr"] > 0
    assert not set(PROBED) & first.keys() and set(PROBED) <= second.keys()
    assert 0 < first["rollout/correction_mean"] < 1.5
    start = torch.load(out / "one" / "tied" / "weights.pt")["model.norm.weight"]
    assert results["one/tied"]["third"]["policy/loss"] != second["policy/loss"] and start.isfinite().all()


@pytest.mark.parametrize("case", [*EVERY, "bf16"])
def test_a_resumed_actor_continues_bit_for_bit(results: dict[str, Any], case: str) -> None:
    assert results[case]["resumed"] == results[case]["third"]


@pytest.mark.parametrize("layout", [layout for world in LAYOUTS if world > 1 for layout in LAYOUTS[world] if "optimizer" not in layout])
def test_a_checkpoint_of_one_rank_continues_at_any_layout(results: dict[str, Any], layout: str) -> None:
    same(results[f"{layout}/tied"]["resharded"], results["one/tied"]["third"])


def test_the_two_kinds_of_optimizer_state_are_not_mixed(results: dict[str, Any]) -> None:
    refusal = results["dp2_distributed_optimizer/tied"]["resharded"]
    assert "parallel.distributed_optimizer=true" in refusal and "was written with false" in refusal
