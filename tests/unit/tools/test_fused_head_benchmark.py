"""The fused-head benchmark on a tiny problem, without its peers: what it reports, and that it tells right from wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tools.benchmarks import fused_head
from tools.benchmarks.fused_head import FORWARD, TRAINING, benchmark, table
from tools.benchmarks.fused_head_measure import CpuMeter, Problem, Reference, Shape, make_problem
from tools.benchmarks.fused_head_peers import BASELINES, OURS, Head, Unavailable, Variant, from_logprobs

TINY = Shape(tokens=48, hidden=16, vocabulary=200)
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]


def from_package(module: str) -> Variant:
    def build(device: torch.device) -> Head:
        __import__(module)
        raise AssertionError(f"{module} was not expected to be there")

    return Variant("missing", module, build)


def refusing(device: torch.device) -> Head:
    raise Unavailable("its kernels need CUDA")


def without_entropy(device: torch.device) -> Head:
    def logprobs_of(problem: Problem, entropy: bool) -> tuple[Tensor, None]:
        return torch.log_softmax(problem.hidden @ problem.weight.t(), -1).gather(1, problem.targets[:, None])[:, 0], None

    return from_logprobs(logprobs_of, entropy=False)


def failing(device: torch.device) -> Head:
    def logprobs_of(problem: Problem, entropy: bool) -> tuple[Tensor, None]:
        raise RuntimeError("no kernel for this shape\nat line 3")

    return from_logprobs(logprobs_of, entropy=False)


OTHERS = (
    Variant("plain", "torch", without_entropy),
    Variant("failing", "somewhere", failing),
    Variant("refusing", "somewhere", refusing),
    from_package("a_package_that_nobody_has"),
)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return benchmark(TINY, CPU, (*BASELINES, *OURS, *OTHERS), rounds=2)


def entries(result: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    return [entry for entry in result["results"] if all(entry.get(name) == value for name, value in fields.items())]


def test_every_variant_is_measured_in_every_mode_or_says_why_not(result: dict[str, Any]) -> None:
    for entry in result["results"]:
        assert ("not_run" in entry) != ("cpu_s" in entry)
    for mode in (FORWARD, TRAINING):
        for entropy in (True, False):
            (entry,) = entries(result, name="policy_head", mode=mode, entropy=entropy)
            assert entry["cpu_s"] > 0 and entry["wall_s"] > 0 and len(entry["cpu_s_of_rounds"]) == 2
            assert entry["time_ratio"] > 0 and entry["fraction_of_limit"] > 0
    assert [entry["mode"] for entry in entries(result, name="policy_head, own loss")] == [TRAINING, TRAINING]
    assert result["products_tflops"] > 0


def test_our_variants_are_right(result: dict[str, Any]) -> None:
    ours = entries(result, package="megatron_nsr")
    assert {entry["name"] for entry in ours} == {variant.name for variant in OURS}
    for entry in ours:
        expected = {"logprob_nats"} | ({"entropy_nats"} if entry["entropy"] else set())
        assert entry["errors"].keys() == expected | ({"d_hidden", "d_weight"} if entry["mode"] == TRAINING else set())
        assert max(entry["errors"].values()) < 1e-4, entry


def test_a_wrong_gradient_shows_in_the_errors() -> None:
    problem = make_problem(TINY, CPU, torch.float32)
    right = Reference(problem)
    d_hidden = torch.zeros_like(problem.hidden).index_copy(0, right.tokens, right.d_hidden["policy"].float())
    d_weight = torch.zeros_like(problem.weight).index_copy(0, right.entries, right.d_weight["policy"].float())
    assert max(right.gradient_errors("policy", d_hidden, d_weight).values()) < 1e-6
    assert right.gradient_errors("policy", 1.01 * d_hidden, d_weight)["d_hidden"] == pytest.approx(0.01, rel=1e-3)
    assert right.gradient_errors("policy+entropy", d_hidden, d_weight)["d_weight"] > 1e-3


def test_the_clip_acts_in_the_problem_and_rounding_decides_none() -> None:
    problem = make_problem(TINY, CPU, torch.float32)
    logprobs = torch.log_softmax((problem.hidden @ problem.weight.t()).detach(), -1).gather(1, problem.targets[:, None])[:, 0]
    ratio = (logprobs - problem.old_logprobs).exp()
    positive = problem.weights > 0
    assert (ratio[positive] > 1.28).any() and (ratio[~positive] < 0.8).any()
    assert torch.minimum((ratio - 0.8).abs(), (ratio - 1.28).abs()).min() > 0.1


def test_what_cannot_run_is_reported_with_the_reason(result: dict[str, Any]) -> None:
    assert [entry["not_run"] for entry in entries(result, name="refusing")] == ["its kernels need CUDA"]
    (missing,) = entries(result, name="missing")
    assert "a_package_that_nobody_has" in missing["not_run"] and "make bench-deps" in missing["not_run"]
    (plain,) = entries(result, name="plain", entropy=True)
    assert plain["not_run"] == "it computes no entropy"
    for mode in (FORWARD, TRAINING):
        (failed,) = entries(result, name="failing", mode=mode)
        assert failed["not_run"] == "no kernel for this shape"
    lines = table(result).splitlines()
    assert "  refusing: not run: its kernels need CUDA" in lines
    assert f"  failing ({FORWARD}): not run: no kernel for this shape" in lines


def test_ratios_are_to_the_baseline_of_equal_terms(result: dict[str, Any]) -> None:
    for baseline in BASELINES:
        for entry in entries(result, name=baseline.name):
            if "cpu_s" in entry:
                assert entry["time_ratio"] == 1
    (mean,) = entries(result, name=BASELINES[1].name, mode=TRAINING, entropy=False)
    (policy,) = entries(result, name=BASELINES[0].name, mode=TRAINING, entropy=False)
    (ours,) = entries(result, name="policy_head", mode=TRAINING, entropy=False)
    assert mean["terms"] != policy["terms"] == ours["terms"]
    assert ours["time_ratio"] == pytest.approx(ours["cpu_s"] / policy["cpu_s"])


def test_peak_memory_is_what_a_call_held_at_once_above_what_was_there_before() -> None:
    def call() -> float:
        first = torch.ones(20 * 2**18)
        return float((first * 2).sum())

    held_already = torch.ones(50 * 2**18)
    for _ in range(2):  # an earlier call's peak leaves no trace
        peak = CpuMeter().peak_bytes(call)
        assert peak is not None and peak == pytest.approx(40 * 2**20, rel=0.1)
    assert held_already.sum() == len(held_already)


def test_it_runs_as_a_script_and_writes_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["fused_head.py", "--shape", "16,8,50", "--rounds", "1", "--json", str(path)])
    monkeypatch.setattr(fused_head, "PEERS", OTHERS)
    monkeypatch.setattr(fused_head, "find_peers", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    fused_head.main()
    written = json.loads(path.read_text())
    assert written["device"] == "cpu" and written["rounds"] == 1 and written["goal"] == pytest.approx(fused_head.CPU_GOAL, rel=1e-3)
    assert written["versions"]["torch"].startswith("2.")
    assert [shape["vocabulary"] for shape in written["shapes"]] == [50]
    script = subprocess.run(
        [sys.executable, ROOT / "tools" / "benchmarks" / "fused_head.py", "--shape", "9,8,50"], cwd=tmp_path, capture_output=True, text=True
    )
    assert script.returncode == 2 and "9 tokens do not split into 8 equal sequences" in script.stderr
