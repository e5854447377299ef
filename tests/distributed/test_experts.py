"""A mixture of experts trains at every layout as on one rank; its experts are loaded, pushed and stored wherever they live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.expert_cases import LAYOUTS, MOVES
from tests.distributed.launcher import run_cases
from tests.distributed.test_training import close, identical, same
from tests.tiny_models import write_tiny_model

EVERY = [layout for world in LAYOUTS for layout in LAYOUTS[world]]
SAME_LOSS = [layout for layout in EVERY if layout not in ("one", "one_without_aux_loss")]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts")


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, Any]:
    """One torchrun start for each world size, in an order in which each finds the checkpoints that it continues."""
    write_tiny_model(out / "model", "qwen3_moe", tied=False)
    found: dict[str, Any] = {}
    for world in (4, 1, 2):
        found |= run_cases("tests.distributed.expert_cases", world, [out / "model", out])
    return found


@pytest.mark.parametrize("layout", SAME_LOSS)
def test_losses_and_gradient_norms_equal_those_of_one_rank(results: dict[str, Any], layout: str) -> None:
    for got, want in zip(results[layout]["metrics"], results["one"]["metrics"], strict=True):
        same(got, want)
        assert got["policy/aux_loss"] == pytest.approx(want["policy/aux_loss"], rel=1e-5)


@pytest.mark.parametrize("layout", SAME_LOSS)
def test_updated_weights_equal_those_of_one_rank(results: dict[str, Any], out: Path, layout: str) -> None:
    close(torch.load(out / layout / "weights.pt"), torch.load(out / "one" / "weights.pt"))


def test_the_load_balancing_loss_is_part_of_the_gradient_but_not_of_the_policy_loss(results: dict[str, Any], out: Path) -> None:
    with_loss, without = results["one"]["metrics"][0], results["one_without_aux_loss"]["metrics"][0]
    assert with_loss["policy/aux_loss"] > 1 and "policy/aux_loss" not in without
    assert with_loss["policy/grad_norm"] != pytest.approx(without["policy/grad_norm"], rel=1e-2)
    assert not identical(out / "one" / "weights.pt", out / "one_without_aux_loss" / "weights.pt")


@pytest.mark.parametrize("layout", EVERY)
def test_a_push_hands_out_what_was_loaded(results: dict[str, Any], layout: str) -> None:
    assert results[layout]["push"] == {"equal": True, "same_sums": True}


@pytest.mark.parametrize("layout", EVERY)
def test_a_resumed_actor_continues_bit_for_bit(results: dict[str, Any], out: Path, layout: str) -> None:
    assert results[layout]["resumed"] == results[layout]["third"]
    assert identical(out / layout / "resumed.pt", out / layout / "third.pt")


@pytest.mark.parametrize(("source", "layout"), [move for world in MOVES for move in MOVES[world]])
def test_a_checkpoint_continues_at_another_layout(results: dict[str, Any], out: Path, source: str, layout: str) -> None:
    same(results[f"{source}-{layout}"], results["one"]["third"])
    close(torch.load(out / layout / f"from_{source}.pt"), torch.load(out / "one" / "third.pt"))
