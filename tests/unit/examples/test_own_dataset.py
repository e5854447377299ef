"""The example data set: its table becomes rows that are read and graded, by the command that its docstring gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from examples.own_dataset import convert
from examples.quickstart.grader import PuzzleGrader
from megatron_nsr.data.sources import read_rows
from megatron_nsr.types import Outcome, Prompt, UserError

TABLE = "numbers,target,operators\n3 7 2,20,+*\n9 5 4,0,--\n"


def test_its_rows_are_read_and_its_answers_are_right(tmp_path: Path) -> None:
    (tmp_path / "puzzles.csv").write_text(TABLE)
    out = tmp_path / "deep" / "train.jsonl"
    command = [sys.executable, "-m", "examples.own_dataset", str(tmp_path / "puzzles.csv"), str(out)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"2 problems in {out}\n"
    rows = read_rows(out, field="data.train")
    assert [(row.id, row.question) for row in rows] == [("own/0", "3?7?2=20"), ("own/1", "9?5?4=0")]
    for row in rows:
        prompt = Prompt(row.id, str(row.question), (1,), row.answer, extra=row.extra)
        assert PuzzleGrader().grade(rf"\boxed{{{row.answer}}}", prompt).outcome is Outcome.CORRECT


def test_an_empty_table_is_refused_before_a_run(tmp_path: Path) -> None:
    (tmp_path / "puzzles.csv").write_text(TABLE.splitlines()[0])
    with pytest.raises(UserError, match=r"train\.jsonl: it has no rows"):
        convert(tmp_path / "puzzles.csv", tmp_path / "train.jsonl")
