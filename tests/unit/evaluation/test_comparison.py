"""Evaluations of many checkpoints in one table, one file and one picture."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_nsr.evaluation.comparison import (
    COLUMNS,
    comparison_records,
    load_evaluations,
    render_comparison,
    write_picture,
    write_records,
)
from megatron_nsr.evaluation.results import benchmark_result
from megatron_nsr.evaluation.votes import count_votes
from megatron_nsr.observability.run_directory import RunDirectory, write_json
from megatron_nsr.types import Outcome, Prompt, Reason, UserError, Verdict

RIGHT, WRONG = Verdict(Outcome.CORRECT, Reason.MATCH, "1"), Verdict(Outcome.WRONG, Reason.MISMATCH, "2")


def entry(counts: list[int], n: int = 4) -> dict[str, Any]:
    prompts = [Prompt(f"p{i}", "", (), "1", extra={"level": i % 2}) for i in range(len(counts))]
    verdicts = [[RIGHT] * count + [WRONG] * (n - count) for count in counts]
    return benchmark_result(prompts, verdicts, count_votes(verdicts, None))


def evaluate(run: Path, step: int, **benchmarks: dict[str, Any]) -> Path:
    path = RunDirectory(run).evaluation(step)
    write_json(path, {"step": step, "benchmarks": benchmarks, "heldout_entropy": None})
    return path


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """A base, a run evaluated twice, and a file alone."""
    evaluate(tmp_path / "base", 0, MATH=entry([0, 1, 2, 4]), AMC=entry([4, 0]))
    evaluate(tmp_path / "nsr", 10, MATH=entry([1, 1, 2, 4]))
    evaluate(tmp_path / "nsr", 20, MATH=entry([2, 2, 3, 4]))
    return [tmp_path / "base", tmp_path / "nsr", evaluate(tmp_path / "other", 5, MATH=entry([3] * 6, n=8))]


def test_a_run_brings_all_its_evaluations_and_a_file_itself(paths: list[Path]) -> None:
    assert [(item.label, item.result.step) for item in load_evaluations(paths)] == [
        ("base", 0),
        ("nsr, step 10", 10),
        ("nsr, step 20", 20),
        ("step_5", 5),
    ]


def test_the_table_has_a_row_for_each_evaluation_and_benchmark(paths: list[Path]) -> None:
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(render_comparison(load_evaluations(paths)))
    text = console.export_text()
    assert "…" not in text
    for part in ("MATH: 4 or 6 problems", "AMC: 2 problems", "nsr, step 20", "Pass@8", " 68.8 ", " 43.8 ", "cons@n", " – "):
        assert part in text


def test_the_records_hold_every_number(paths: list[Path]) -> None:
    records = comparison_records(load_evaluations(paths))
    assert all(tuple(record) == COLUMNS for record in records)
    one = {"evaluation": "nsr, step 20", "benchmark": "MATH", "group": "all", "measure": "pass", "k": 1}
    (found,) = [record for record in records if one.items() <= record.items()]
    assert found["value"] == pytest.approx(11 / 16) and found["low"] <= found["value"] <= found["high"]
    assert found["difference"] == pytest.approx((2 + 1 + 1 + 0) / 16)  # paired over the four problems
    assert found["difference_low"] <= found["difference"] <= found["difference_high"]
    assert found["difference_high"] - found["difference_low"] < found["high"] - found["low"]
    two = {"evaluation": "base", "benchmark": "MATH", "group": "level=1", "measure": "cons"}
    level = [record for record in records if two.items() <= record.items()]
    assert [record["k"] for record in level] == [1, 2, 4] and level[0]["value"] == pytest.approx(5 / 8) and level[0]["problems"] == 2


def test_there_is_no_difference_to_other_problems(paths: list[Path]) -> None:
    records = comparison_records(load_evaluations(paths))
    assert all(record["difference"] is None for record in records if record["evaluation"] in ("base", "step_5"))


def test_the_files_can_be_read_back(paths: list[Path], tmp_path: Path) -> None:
    found = load_evaluations(paths)
    records = comparison_records(found)
    write_records(tmp_path / "all.json", records)
    assert json.loads((tmp_path / "all.json").read_text()) == records
    write_records(tmp_path / "all.csv", records)
    rows = list(csv.DictReader((tmp_path / "all.csv").open()))
    assert [float(row["value"]) for row in rows] == [record["value"] for record in records] and rows[0]["difference"] == ""
    write_picture(tmp_path / "curves.png", found)
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_intervals_of_an_earlier_version_s_file_are_made_up_for(tmp_path: Path) -> None:
    new = entry([0, 1, 2, 4])
    old = {"n": 4, "pass_at_k": new["pass_at_k"], "problems": [{k: p[k] for k in ("id", "correct", "n")} for p in new["problems"]]}
    found = load_evaluations(
        [evaluate(tmp_path / "old", 1, MATH=old), evaluate(tmp_path / "bare", 1, MATH={"n": 4, "pass_at_k": {"1": 0.5}})]
    )
    lows = {str(k): low for k, (low, _) in found[0].benchmarks["MATH"].curve.intervals.items()}
    assert lows == pytest.approx(new["ci_low"])
    assert [record["low"] for record in comparison_records(found) if record["evaluation"].startswith("bare")] == [None]
    write_picture(tmp_path / "curves.png", found)


def test_a_single_problem_has_no_interval_whatever_its_file_says(tmp_path: Path) -> None:
    old = entry([1]) | {"ci_low": {"1": 0.25}, "ci_high": {"1": 0.25}}
    counts = {key: entry([3])[key] for key in ("n", "pass_at_k", "problems")}
    found = load_evaluations([evaluate(tmp_path / "old", 1, MATH=old), evaluate(tmp_path / "new", 1, MATH=counts)])
    records = comparison_records(found)
    assert {record[bound] for record in records for bound in ("low", "high", "difference_low", "difference_high")} == {None}
    (later,) = [record for record in records if record["evaluation"].startswith("new") and record["k"] == 1]
    assert later["difference"] == 0.5
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(render_comparison(found))
    assert " 75.0 " in console.export_text()
    write_picture(tmp_path / "curves.png", found)


def test_wrong_arguments_are_named(paths: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no evaluation"):
        load_evaluations([*paths, tmp_path / "empty"])
    with pytest.raises(UserError, match="absent: no such file or directory"):
        load_evaluations([tmp_path / "absent"])
    (tmp_path / "broken.json").write_text('{"step": 1, "benchmarks": {"MATH": {"n": 4}}}')
    with pytest.raises(UserError, match=r"broken\.json: not an evaluation \(KeyError: 'pass_at_k'\)"):
        load_evaluations([tmp_path / "broken.json"])
    with pytest.raises(UserError, match=r"out=.*table\.txt: its name must end in \.csv or \.json"):
        write_records(tmp_path / "table.txt", [])
    with pytest.raises(UserError, match=r"plot=.*: its name must end in \.png"):
        write_picture(tmp_path / "curves.svg", [])
    with pytest.raises(UserError, match="no directory"):
        write_records(tmp_path / "none" / "table.csv", [])
