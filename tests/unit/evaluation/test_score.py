from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_nsr.evaluation.score import ScoreSummary, render, score_file
from megatron_nsr.types import UserError


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
    summary = score(path, out)
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"question_id": "q1", "outcome": "correct", "reason": "match", "answer": "0.5"},
        {"question_id": 2, "outcome": "wrong", "reason": "mismatch", "answer": "3"},
        {"question_id": "q1", "outcome": "wrong", "reason": "no_box", "answer": None},
        {"question_id": 2, "outcome": "correct", "reason": "match", "answer": "4"},
        {"question_id": 2, "outcome": "none", "reason": "bad_gold", "answer": None},
    ]
    assert summary == ScoreSummary(
        samples=5,
        questions=2,
        samples_per_question=(2, 3),
        pass_at_k={1: (1 / 2 + 1 / 3) / 2, 2: (1 + 2 / 3) / 2},
        outcomes={"correct": 2, "wrong": 2, "none": 1},
        reasons={"match": 2, "mismatch": 1, "no_box": 1, "bad_gold": 1},
    )
    assert sorted(tmp_path.iterdir()) == [path, out]


def test_the_tables_show_the_numbers() -> None:
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(render(ScoreSummary(5, 2, (2, 3), {1: 0.41666, 2: 0.8333}, {"correct": 2, "none": 3}, {"match": 2, "bad_gold": 3})))
    text = console.export_text()
    for part in ("2 questions, 2 to 3 samples each", "41.67 %", "83.33 %", "bad_gold", "60.00 %"):
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
        (path, path, "math_verify", "is the file of samples itself"),
        (path, tmp_path, "math_verify", "is a directory; name a file"),
        (path, tmp_path / "none" / "out", "math_verify", "no directory"),
        (path, out, "no_such_module:Grader", "cannot import no_such_module"),
    ]:
        with pytest.raises(UserError, match=message):
            score(samples, where, grader=grader)
    assert sorted(tmp_path.iterdir()) == [empty, path]
