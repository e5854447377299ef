from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_nsr.evaluation.results import benchmark_result
from megatron_nsr.evaluation.score import ScoreSummary, check_output, render, score_file, write_summary
from megatron_nsr.types import Outcome, Prompt, Reason, UserError, Verdict


def score(path: Path, out: Path, **settings: Any) -> ScoreSummary:
    reward = {"grader": "math_verify", "workers": 1, "timeout_s": 20.0, "memory_limit_mib": 512, "cache_size": 100}
    return score_file(path, out, **{**reward, **settings})


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


GOOD = {"question_id": 1, "response": r"\boxed{1}", "answer": "1"}


def test_verdicts_come_out_in_order_and_are_summed_up(tmp_path: Path) -> None:
    path = write(
        tmp_path / "samples.jsonl",
        {"question_id": "q1", "response": r"so \boxed{0.5}", "answer": r"\frac12"},
        {"question_id": 2, "response": r"\boxed{3}", "label": 4},
        {"question_id": "q1", "response": "no box", "answer": r"\frac12"},
        {"question_id": 2, "response": r"\boxed{4}", "label": 4},
        {"question_id": 2, "response": r"\boxed{4}", "label": ""},
    )
    with path.open("a") as file:
        file.write("\n")
    out = tmp_path / "verdicts.jsonl"
    summary = score(path, out, allow_uneven=True)
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"question_id": "q1", "outcome": "correct", "reason": "match", "answer": "0.5"},
        {"question_id": 2, "outcome": "wrong", "reason": "mismatch", "answer": "3"},
        {"question_id": "q1", "outcome": "wrong", "reason": "no_box", "answer": None},
        {"question_id": 2, "outcome": "correct", "reason": "match", "answer": "4"},
        {"question_id": 2, "outcome": "none", "reason": "bad_gold", "answer": None},
    ]
    assert summary.result["pass_at_k"] == {"1": pytest.approx((1 / 2 + 1 / 3) / 2), "2": pytest.approx((1 + 2 / 3) / 2)}
    assert summary.result["cons_at_k"]["1"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert [(entry["id"], entry["correct"], entry["n"]) for entry in summary.result["problems"]] == [("q1", 1, 2), ("2", 1, 3)]
    assert summary.outcomes == {"correct": 2, "wrong": 2, "none": 1}
    assert summary.reasons == {"match": 2, "mismatch": 1, "no_box": 1, "bad_gold": 1}
    assert sorted(tmp_path.iterdir()) == [path, out]


def test_the_majority_of_equivalent_answers_is_voted_on(tmp_path: Path) -> None:
    answers = [r"\frac12", "0.5", "1/2", "7", "7", "x", ""]
    path = write(tmp_path / "samples.jsonl", *({"question_id": 1, "response": rf"\boxed{{{a}}}", "answer": "0.5"} for a in answers))
    result = score(path, tmp_path / "out.jsonl").result
    assert result["pass_at_k"]["1"] == result["cons_at_k"]["1"] == pytest.approx(3 / 7)
    assert result["pass_at_k"]["4"] > result["cons_at_k"]["4"] > 3 / 7


def test_levels_of_a_file_group_its_scores_and_the_summary_is_an_evaluation(tmp_path: Path) -> None:
    rows = [{**GOOD, "question_id": name, "level": level} for name, level in (("a", 1), ("b", 2), ("c", 2))]
    path = write(tmp_path / "samples.jsonl", *rows)
    summary = score(path, tmp_path / "out.jsonl")
    assert {value: group["problems"] for value, group in summary.result["groups"]["level"].items()} == {"1": 1, "2": 2}
    write_summary(tmp_path / "scores.json", summary, source=path, benchmark="toy")
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["benchmarks"]["toy"] == summary.result and written["model"] == str(path)


def test_a_file_that_was_cut_short_is_not_scored_silently(tmp_path: Path) -> None:
    path = write(tmp_path / "samples.jsonl", *[{**GOOD, "question_id": name} for name in ("a", "b", "a", "b", "c", "a", "b", "c")])
    with pytest.raises(
        UserError, match=r"samples\.jsonl:8: question 'c' ends here with 2 samples, where most questions have 3; .*--allow-uneven"
    ):
        score(path, tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == [path]
    assert score(path, tmp_path / "out.jsonl", allow_uneven=True).result["n"] == 2


def test_the_tables_show_the_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "samples.jsonl", GOOD, {**GOOD, "response": "no box"}, {**GOOD, "response": r"\boxed{2}"})
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(render(score(path, tmp_path / "out.jsonl"), "toy"))
    text = console.export_text()
    for part in ("toy: 1 problems, 3 samples each", "33.33 %", "66.67 %", "no_box", "Verdicts on 3 samples"):
        assert part in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question_id": 1, "response": "x"}', "no `answer` or `label`"),
        ('{"question_id": 1, "answer": "x"}', "no `response`"),
        ('{"response": "x", "answer": "x"}', "no `question_id`"),
        ('{"question_id": 1, "response": ["x"], "answer": "x"}', r'`response` is \["x"\], not text'),
        ('{"question_id": 1, "response": "x", "answer": null}', "`answer` is null, not text or a number"),
        ('{"question_id": true, "response": "x", "answer": "x"}', "`question_id` is true, not text or a number"),
        ("[1]", "a JSON list, not an object"),
        ('{"question_id": 1', "not JSON"),
        ("\udcff", "not UTF-8"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_graded(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "samples.jsonl", GOOD)
    with path.open("ab") as file:
        file.write(line.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(UserError, match=rf"samples\.jsonl:2: {message}"):
        score(path, tmp_path / "out.jsonl", grader="no_such_module:Grader")
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_paths_and_graders_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "samples.jsonl", GOOD)
    empty = write(tmp_path / "empty.jsonl")
    out = tmp_path / "out.jsonl"
    for samples, where, grader, message in [
        (tmp_path / "absent", out, "math_verify", "absent: no such file"),
        (empty, out, "math_verify", "empty.jsonl: no samples"),
        (path, path, "math_verify", r"samples\.jsonl itself; name another file"),
        (path, tmp_path, "math_verify", "is a directory; name a file"),
        (path, tmp_path / "none" / "out", "math_verify", "no directory"),
        (path, out, "no_such_module:Grader", "cannot import no_such_module"),
    ]:
        with pytest.raises(UserError, match=message):
            score(samples, where, grader=grader)
    assert sorted(tmp_path.iterdir()) == [empty, path]
    with pytest.raises(UserError, match=r"summary=.*: is .*out\.jsonl itself"):
        check_output("summary", out, path, out)


@pytest.mark.parametrize("timeouts", [0, 2])
def test_timeouts_are_told_with_what_helps_against_them(timeouts: int) -> None:
    verdicts = [Verdict(Outcome.CORRECT, Reason.MATCH, "1"), *[Verdict(Outcome.NONE, Reason.TIMEOUT)] * timeouts]
    result = benchmark_result([Prompt("a", "", (), "1")], [verdicts], None)
    summary = ScoreSummary(result, {"correct": 1, "none": timeouts}, {"match": 1} | ({"timeout": timeouts} if timeouts else {}))
    console = Console(file=io.StringIO(), width=200)
    console.print(render(summary, "toy"))
    assert isinstance(console.file, io.StringIO)
    told = [line for line in console.file.getvalue().splitlines() if "--timeout-s" in line]
    assert [line.partition(",")[0] for line in told] == ([f"timeouts: {timeouts}"] if timeouts else [])
