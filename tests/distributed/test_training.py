"""Updates at every parallel layout equal those of one rank, and a checkpoint loses nothing, at the same layout or another."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.distributed.checkpoint import FileSystemReader

from tests.distributed.launcher import run_cases
from tests.distributed.training_cases import CASES, DETOURS, HELDOUT, MOVES, OWN_LOSS, SIGNS
from tests.plain_entropy import plain_entropy, random_responses
from tests.tiny_models import write_tiny_model

PARALLEL = [case for cases in CASES.values() for case in cases if not case.startswith("one/")]
BF16 = [f"bf16/{case}" for case, _ in DETOURS]
EVERY = ["one/tied", "one/untied", *PARALLEL, *BF16]
CONTINUED = [move for moves in MOVES.values() for move in moves]
# Log-prob gaps are against random numbers here; they follow from the log-probs that are compared.
COMPARED = ("policy/loss", "policy/grad_norm", "policy/entropy", "policy/logprob", "policy/kl_reference", "rollout/correction_mean")
BY_SIGN = ("policy/loss", "policy/entropy", "policy/logprob", "policy/grad_norm_head")
PROBED = ("policy/grad_norm_psr", "policy/grad_norm_nsr", "policy/grad_cosine")  # every second step
CLIPPED = ("policy/clip_fraction_psr", "policy/clip_fraction_nsr")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def models(out: Path) -> dict[str, transformers.PreTrainedModel]:
    return {name: write_tiny_model(out / "models" / name, "qwen3", tied=name == "tied") for name in ("tied", "untied")}


@pytest.fixture(scope="module")
def results(out: Path, models: dict[str, transformers.PreTrainedModel]) -> dict[str, Any]:
    """One torchrun start for each world size, in an order in which each finds the checkpoints that it continues."""
    found: dict[str, Any] = {}
    for world in (4, 1, 2):
        found |= run_cases("tests.distributed.training_cases", world, [out / "models", out], timeout_s=900)
    return found


def same(got: dict[str, float], want: dict[str, float], rel: float = 1e-4) -> None:
    assert got.keys() == want.keys()
    probed = [name for name in PROBED if name in want]
    for name in (*COMPARED, *(f"{name}_{sign}" for name in BY_SIGN for sign in ("psr", "nsr")), *probed):
        assert got[name] == pytest.approx(want[name], rel=rel, abs=1e-6), name
    for name in CLIPPED:  # a token at the very edge may fall either way
        assert got[name] == pytest.approx(want[name], abs=0.03), name


def close(weights: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> None:
    assert weights.keys() == reference.keys()
    for name, tensor in weights.items():
        assert (tensor - reference[name]).norm() <= 1e-4 * reference[name].norm(), name


def identical(path: Path, reference: Path) -> bool:
    weights, others = torch.load(path), torch.load(reference)
    return weights.keys() == others.keys() and all(torch.equal(tensor, others[name]) for name, tensor in weights.items())


@pytest.mark.parametrize("case", PARALLEL)
def test_losses_and_gradient_norms_equal_those_of_one_rank(results: dict[str, Any], case: str) -> None:
    reference = results[f"one/{case.split('/')[1]}"]
    for got, want in zip(results[case]["metrics"], reference["metrics"], strict=True):
        same(got, want)


@pytest.mark.parametrize("case", PARALLEL)
def test_updated_weights_equal_those_of_one_rank(results: dict[str, Any], out: Path, case: str) -> None:
    close(torch.load(out / case / "weights.pt"), torch.load(out / "one" / case.split("/")[1] / "weights.pt"))


@pytest.mark.parametrize("case", ["one/tied", "one/untied", *PARALLEL])
def test_held_out_entropy_is_that_of_a_plain_computation(
    results: dict[str, Any], models: dict[str, transformers.PreTrainedModel], case: str
) -> None:
    model = models[case.split("/")[1]]
    entropy, logprob = plain_entropy(model, random_responses(model.config.vocab_size, HELDOUT), 1.0)
    heldout = results[case]["heldout"]
    assert (heldout["policy/entropy"], heldout["policy/logprob"]) == (pytest.approx(entropy, rel=1e-6), pytest.approx(logprob, rel=1e-6))


def test_the_cases_exercise_what_they_claim(results: dict[str, Any], out: Path) -> None:
    first, second = results["one/tied"]["metrics"]
    assert first["policy/updates"] == 2 and second["policy/updates"] == 1
    assert first["policy/clip_fraction_psr"] > 0 and first["policy/clip_fraction_nsr"] > 0
    assert not set(PROBED) & first.keys() and set(PROBED) <= second.keys()
    assert 0 < first["rollout/correction_mean"] < 1.5
    assert first["policy/kl_reference"] == 0 and second["policy/kl_reference"] > 1e-4
    start = torch.load(out / "one" / "tied" / "weights.pt")["model.norm.weight"]
    assert results["one/tied"]["third"]["policy/loss"] != second["policy/loss"] and start.isfinite().all()


@pytest.mark.parametrize("case", SIGNS.values())
def test_the_gradients_of_psr_and_nsr_add_up_to_that_of_reinforce(results: dict[str, Any], case: str) -> None:
    found = results[f"signs/{case}"]
    assert found["error"] < 1e-5
    assert found["clip_fraction_psr"] > 0 and found["clip_fraction_nsr"] > 0


def test_a_loss_of_whole_sequences_is_that_of_one_rank_where_ranks_share_them(results: dict[str, Any], out: Path) -> None:
    one, split = OWN_LOSS.values()
    got, want = results[f"own/{split}"], results[f"own/{one}"]
    assert got.keys() == want.keys() and want["policy/updates"] == 2 and want["policy/loss_nsr"] != 0
    for name in want:
        assert got[name] == pytest.approx(want[name], rel=1e-4, abs=1e-6), name
    close(torch.load(out / "own" / split / "weights.pt"), torch.load(out / "own" / one / "weights.pt"))


@pytest.mark.parametrize("case", EVERY)
def test_a_resumed_actor_continues_bit_for_bit(results: dict[str, Any], out: Path, case: str) -> None:
    assert results[case]["resumed"] == results[case]["third"]
    assert identical(out / case / "resumed.pt", out / case / "third.pt")


@pytest.mark.parametrize(("case", "layout"), CONTINUED)
def test_a_checkpoint_continues_at_another_layout(results: dict[str, Any], out: Path, case: str, layout: str) -> None:
    undisturbed = f"one/{case.split('/')[1]}"
    same(results[f"{case}-{layout}"], results[undisturbed]["third"])
    close(torch.load(out / case / f"at_{layout}.pt"), torch.load(out / undisturbed / "third.pt"))


@pytest.mark.parametrize("case", BF16)
def test_nothing_is_lost_by_way_of_another_layout(results: dict[str, Any], out: Path, case: str) -> None:
    assert results[case]["returned"] == results[case]["third"]
    assert identical(out / case / "returned.pt", out / case / "third.pt")
    assert not identical(out / case / "third.pt", out / case / "weights.pt")


def test_ranks_write_a_distributed_optimizer_in_equal_parts(results: dict[str, Any], out: Path) -> None:
    metadata = FileSystemReader(out / "dp2_distributed" / "untied" / "checkpoints" / "step_2" / "state").read_metadata()
    elements, largest = Counter[str](), 0
    for index, stored in metadata.storage_data.items():
        if index.fqn.startswith("optimizer.state.exp_avg."):
            chunks = {chunk.offsets: math.prod(chunk.sizes) for chunk in metadata.state_dict_metadata[index.fqn].chunks}
            elements[stored.relative_path.split("_")[2]] += chunks[index.offset]
            largest = max(largest, chunks[index.offset])
    assert elements.keys() == {"0", "1"} and abs(elements["0"] - elements["1"]) <= largest
