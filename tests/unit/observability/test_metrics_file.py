"""Metric names have one meaning, and metrics.jsonl survives kills, resumes and numbers that are not finite."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_nsr.observability.loggers import JsonlLogger
from megatron_nsr.observability.metrics import METRICS, encode_line, metric_meaning, read_metrics, steps_by
from megatron_nsr.types import StepMetrics, UserError

DOCUMENT = Path(__file__).parents[3] / "docs" / "metrics.md"


def log(path: Path, steps: range, completed: int = 0, value: float = 0.1) -> None:
    logger = JsonlLogger(path, completed)
    for step in steps:
        logger.log(StepMetrics(step, {"policy/loss": value * step}))
    logger.close()


def test_the_document_holds_every_metric_and_no_other() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| (.+?) \|$", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert dict(rows) == {name: meaning.replace("|", "\\|") for name, meaning in METRICS.items()}
    assert len(rows) == len(METRICS)


@pytest.mark.parametrize("name", ["eval/MATH/pass@8", "eval/aime 2024/pass@256", "policy/loss_nsr", "eval/MATH/greedy_accuracy"])
def test_a_known_name_has_a_meaning(name: str) -> None:
    assert metric_meaning(name)


@pytest.mark.parametrize("name", ["policy/los", "eval/MATH/pass@0", "eval/pass@8", "eval/MATH/pass@8x", "eval/greedy_accuracy"])
def test_an_unknown_name_has_none(name: str) -> None:
    assert metric_meaning(name) is None


def test_steps_are_ranked_by_a_metric_and_equal_ones_by_age(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path)
    for step, value in enumerate((0.5, None, 0.75, float("nan"), 0.75, 0.25), start=1):
        logger.log(StepMetrics(step, {"policy/loss": 1.0} | ({} if value is None else {"eval/validation/pass@1": value})))
    logger.close()
    assert steps_by(path, "eval/validation/pass@1") == [3, 5, 1, 6]
    assert steps_by(path, "eval/other/pass@1") == steps_by(tmp_path / "absent.jsonl", "policy/loss") == []


def test_what_is_not_finite_becomes_null_in_strict_json() -> None:
    line = encode_line(StepMetrics(3, {"a/nan": float("nan"), "a/inf": float("-inf"), "a/one": 1}))
    assert json.loads(line, parse_constant=lambda name: pytest.fail(name)) == {"step": 3, "a/nan": None, "a/inf": None, "a/one": 1.0}


def test_every_step_is_on_disk_before_the_next(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logger.log(StepMetrics(1, {"policy/loss": 0.5}))
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "policy/loss": 0.5}]
    logger.close()


def test_a_resumed_file_equals_an_undisturbed_one(tmp_path: Path) -> None:
    log(tmp_path / "whole.jsonl", range(1, 7))
    log(tmp_path / "resumed.jsonl", range(1, 6))  # the last checkpoint was at step 3
    with (tmp_path / "resumed.jsonl").open("a") as file:
        file.write('{"step": 6, "policy/lo')  # killed while writing
    log(tmp_path / "resumed.jsonl", range(4, 7), completed=3)
    assert (tmp_path / "resumed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_run_that_starts_again_from_nothing_forgets_the_killed_one(tmp_path: Path) -> None:
    log(tmp_path / "metrics.jsonl", range(1, 3), value=9.0)
    log(tmp_path / "metrics.jsonl", range(1, 2), value=0.5)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "policy/loss": 0.5}]


def test_a_torn_last_line_is_skipped_but_a_broken_earlier_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2: not a JSON object with a step"):
        read_metrics(path)
    assert read_metrics(tmp_path / "absent.jsonl") == []
