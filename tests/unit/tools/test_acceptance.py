"""The acceptance program notices what is wrong, counts as the planner does, and keeps what a part that is cut short has measured."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_nsr.planning.flops import attention_products, head_products, layer_products, model_flops
from megatron_nsr.planning.published_models import PUBLISHED
from megatron_nsr.planning.workload import Lengths, Workload
from megatron_nsr.training.packing import pack
from megatron_nsr.types import Trajectory, WeightedSample
from tools import gpu_acceptance
from tools.acceptance import head, page, part, processes, sampled
from tools.acceptance.flops import update_flops
from tools.acceptance.record import Goal, NotRun, Record, Step
from tools.acceptance.results import read, short_name

SHAPE = PUBLISHED["Qwen2.5-7B"]


def record(file: Path, *, dry: bool = False, **goals: Goal) -> Record:
    return Record(file, "head", {}, goals, dry=dry, limit_s=60)


def test_a_check_holds_inside_its_bounds_alone() -> None:
    step = Step("step")
    for value in (1.0, 1.1, 0.9, math.nan):
        step.check("close to 1", value, at_most=1.05, at_least=0.95)
    assert [check["holds"] for check in step.checks] == [True, False, False, False] and not step.holds


def test_a_check_that_a_wrong_implementation_would_pass_fails() -> None:
    seeing, blind = Step("seeing"), Step("blind")
    seeing.check("error", 0.1, at_most=0.2, wrong=0.3)
    blind.check("error", 0.1, at_most=0.2, wrong=0.15)
    assert seeing.holds and not blind.holds and blind.checks[0]["why"] == "a wrong implementation would pass"


def test_a_step_that_fails_leaves_the_others_and_the_file(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    found = record(file)
    with found.step("good") as step:
        step.figure(seconds_of_it=1.23456789)
    with found.step("missing"):
        raise NotRun("no CUDA")
    with found.step("broken"):
        raise ValueError("two\nlines")
    cut_short = read(file)
    assert cut_short["steps"]["good"]["seconds_of_it"] == 1.2346 and not cut_short["complete"] and not cut_short["holds"]
    found.finish()
    steps = read(file)["steps"]
    assert steps["missing"]["not run"] == "no CUDA" and steps["broken"]["error"] == "ValueError: two lines"
    assert read(file)["complete"] and not read(file)["holds"]


def test_a_missing_component_is_no_failure_and_an_interruption_is_not_swallowed(tmp_path: Path) -> None:
    found = record(tmp_path / "result.json")
    with found.step("missing"):
        raise NotRun("no CUDA")
    assert found.holds
    with pytest.raises(KeyboardInterrupt), found.step("interrupted"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("dry", "value", "reached", "holds"), [(False, 0.5, True, True), (False, 0.4, False, False), (True, 0.4, None, True)]
)
def test_a_goal_is_reached_by_a_measurement_alone(tmp_path: Path, dry: bool, value: float, reached: bool | None, holds: bool) -> None:
    found = record(tmp_path / "result.json", dry=dry, share=Goal("a share", at_least=0.45))
    assert read(found.file)["goals"] == [{"goal": "a share", "at_least": 0.45, "reached": None, "why": "not measured"}]
    found.goal("share", value)
    found.finish()
    written = read(found.file)
    assert written["goals"][0]["reached"] is reached and written["goals"][0]["value"] == value and written["holds"] is holds


def batch(lengths: Sequence[tuple[int, int]]) -> Any:
    """Packed sequences of (prompt, response) tokens; the last response token is a target only."""
    trajectories = [Trajectory(0, 0, (1,) * p, np.ones(r, np.int32), np.zeros(r, np.float32), "stop", 0) for p, r in lengths]
    return pack([WeightedSample(trajectory, 1.0, 1.0) for trajectory in trajectories], token_multiple=64)


@given(st.lists(st.tuples(st.integers(2, 40), st.integers(1, 60)), min_size=1, max_size=6), st.integers(1, 3))
def test_operations_are_those_of_every_token_in_its_own_context(lengths: list[tuple[int, int]], copies: int) -> None:
    expected = 0.0
    for prompt, response in lengths:
        tokens = prompt + response - 1
        layer = tokens * (layer_products(SHAPE) + attention_products(SHAPE, tokens / 2))
        expected += 3 * (SHAPE.num_layers * layer + response * head_products(SHAPE))
    assert update_flops(SHAPE, [batch(lengths)] * copies) == pytest.approx(copies * expected, rel=1e-9)


def test_operations_equal_the_planners_for_the_same_lengths() -> None:
    """Sequences of one length; the planner counts the last token, which is never an input."""
    lengths = Lengths(prompt_mean=100.0, response_mean=156.0, response_spread=0.0, cap=256)
    workload = Workload(1, 8, 1, 1.0, lengths, old_logprobs=False, reference=False, critic_mini_batches=0)
    planned = model_flops(SHAPE, workload, workload.kept_tokens)
    assert update_flops(SHAPE, [batch([(101, 156)] * 8)]) == pytest.approx(planned, rel=1e-9)


def test_tokens_are_shared_up_to_the_first_difference() -> None:
    first = [[1, 2, 3, 4], [5, 6]]
    assert sampled.shared_ids(first, first) == 1.0
    assert sampled.shared_ids(first, [[1, 2, 9, 4], [5, 6]]) == pytest.approx(4 / 6)
    assert sampled.shared_ids(first, [[1, 2, 3, 4, 5, 6], [9]]) == pytest.approx(8 / 13)
    assert sampled.shared_ids(first, first[:1]) == 0.0


def check_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Any) -> list[str]:
    """The names of the checks that fail where the head's outputs pass through `fault`."""
    right = head.Case.run
    monkeypatch.setattr(head.Case, "run", lambda *arguments: fault(right(*arguments)))
    step = Step("torch")
    settings = head.Settings(6, 8, 40, 4, (), 0)
    name, case = next(iter(head.cases(settings, torch.float32, torch.device("cpu"))))
    head.compare(step, name, case, "torch", settings.chunk)
    return [check["check"] for check in step.checks if not check["holds"]]


def test_the_heads_checks_hold_and_notice_wrong_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_head(tmp_path, monkeypatch, lambda found: found) == []


@pytest.mark.parametrize("place", [0, 1])
def test_the_heads_checks_notice_a_wrong_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    def scaled(found: tuple[Any, ...]) -> tuple[Any, ...]:
        outputs, *gradients = found
        gradients[place] = gradients[place] * 1.001
        return outputs, *gradients

    failed = check_head(tmp_path, monkeypatch, scaled)
    assert len(failed) == len(head.TERMS) and all(("d_hidden", "d_weight")[place] in name for name in failed)


@pytest.mark.parametrize(
    ("name", "short"),
    [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200 NVL", "h200"), ("", "cpu"), ("A 6", "a-6")],
)
def test_files_are_named_after_the_device(name: str, short: str) -> None:
    assert short_name(name) == short


def run_program(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """The exit status."""
    monkeypatch.setattr(sys, "argv", ["gpu_acceptance.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        gpu_acceptance.main()
    return int(ended.value.code or 0)


def test_wrong_arguments_end_with_status_2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    wrong = {
        "--json DIR: required": ["--dry"],
        "invalid choice: 'heads'": ["--part", "heads", "--json", tmp_path],
        "that is a file": ["--json", tmp_path / "file"],
        "a dry run is no result": ["--dry", "--json", gpu_acceptance.RESULTS / "dry"],
    }
    for message, arguments in wrong.items():
        assert run_program(monkeypatch, *arguments) == 2 and message in capsys.readouterr().err
    assert not (gpu_acceptance.RESULTS / "dry").exists()


def test_a_part_that_takes_too_long_is_killed_and_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_acceptance, "LIMIT_S", 0.01)
    assert run_program(monkeypatch, "--dry", "--part", "head", "--json", tmp_path) == 1
    found = read(tmp_path / "dry-head.json")
    assert not found["holds"] and found["error"] == "took longer than 0 s"


def test_what_a_killed_part_had_started_is_killed_too(tmp_path: Path) -> None:
    nested = (
        f"from tools.acceptance.processes import run; run(['sleep', '600'], __import__('pathlib').Path({str(tmp_path / 'log')!r}), 600)"
    )
    with processes.started(processes.python("-c", nested)) as started:
        while not (inner := psutil.Process(started.pid).children()):
            assert started.poll() is None
            time.sleep(0.01)
    assert not psutil.wait_procs(inner, timeout=60)[1]


def test_a_part_that_did_not_run_is_not_said_to_have_run() -> None:
    ran = [{"part": name, "dry": False, "device": None, "goals": [], "steps": {}} for name in part.PARTS]
    assert page.render(ran).startswith("All parts have run.")
    lacking = [found | ({"not run": "no Transformer Engine"} if found["part"] == "te" else {}) for found in ran]
    assert page.render(lacking).startswith("**Not run yet**: `te`.")


def test_without_a_gpu_a_part_is_not_run_and_says_so(tmp_path: Path) -> None:
    assert not torch.cuda.is_available()
    assert part.run_part("head", tmp_path / "head.json", tmp_path / "work", dry=False)
    found = read(tmp_path / "head.json")
    assert found["not run"] == "torch sees no CUDA device; --dry exercises the program on a CPU" and not found["steps"]
    assert page.measured(tmp_path) == []


def test_the_committed_page_is_what_the_committed_results_say() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert text == page.with_results(text, page.render(page.measured(page.RESULTS)))
