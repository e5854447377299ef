from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_nsr.data.sources import read_rows
from megatron_nsr.types import UserError

Write = Callable[..., Path]


def math_row(index: int, question: str, target: str, solution: str) -> dict[str, Any]:
    """A row in the schema of the reference paper's files."""
    return {
        "level": "Level 3",
        "type": "Algebra",
        "data_source": "TianHongZXY/MATH",
        "prompt": [{"content": question, "role": "user"}],
        "ability": "math",
        "reward_model": {"ground_truth": {"question": question, "solution": solution, "target": target}, "style": "rule"},
        "extra_info": {"index": index, "split": "test"},
    }


@pytest.fixture
def math_file(tmp_path: Path) -> Path:
    rows = [
        math_row(0, "First?", "\\begin{pmatrix}1\\2\\end{pmatrix}", "So \\boxed{0}, no: $\\boxed{\\begin{pmatrix}1\\\\2\\end{pmatrix}}$."),
        math_row(1, "Second?", "7", "It is seven."),
        math_row(2, "Third?", "", "Thus \\boxed{\\frac{1}{2}}."),
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    return tmp_path / "test.parquet"


def test_parquet_takes_the_last_box_of_the_solution_else_the_target(math_file: Path) -> None:
    rows = read_rows(math_file, field="data.train")
    assert [row.answer for row in rows] == ["\\begin{pmatrix}1\\\\2\\end{pmatrix}", "7", "\\frac{1}{2}"]
    assert rows[0].question == ({"role": "user", "content": "First?"},)
    assert [row.id for row in rows] == ["TianHongZXY/MATH/0", "TianHongZXY/MATH/1", "TianHongZXY/MATH/2"]
    assert rows[1].source == "TianHongZXY/MATH"
    assert rows[1].extra == {"level": "Level 3", "type": "Algebra", "ability": "math", "extra_info": {"index": 1, "split": "test"}}


@pytest.mark.parametrize(("limit", "count"), [(None, 3), (2, 2), (10, 3)])
def test_limit_reads_the_first_rows(math_file: Path, limit: int | None, count: int) -> None:
    rows = read_rows(math_file, field="data.train", limit=limit)
    assert [row.id[-1] for row in rows] == ["0", "1", "2"][:count]


def test_ground_truth_may_be_a_plain_value(tmp_path: Path) -> None:
    row = math_row(0, "First?", "", "") | {"id": 12, "reward_model": {"style": "rule", "ground_truth": "34"}}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    (read,) = read_rows(tmp_path / "a.parquet", field="data.train")
    assert (read.id, read.answer) == ("12", "34")


def test_jsonl(write_jsonl: Write) -> None:
    path = write_jsonl(
        {"id": "a", "question": "1 ? 2 = 3", "answer": "+", "response": "\\boxed{+}", "numbers": [1, 2], "target": 3},
        {"id": "b", "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "é"}], "answer": 5, "source": "mine"},
        {"problem": "p", "solution": "\\boxed{1} then \\boxed{2}", "answer": "9"},
    )
    first, second, third = read_rows(path, field="data.train")
    assert (first.question, first.answer, first.response, first.source) == ("1 ? 2 = 3", "+", "\\boxed{+}", "problems")
    assert first.extra == {"numbers": [1, 2], "target": 3}
    assert (second.id, second.answer, second.source, second.response) == ("b", "5", "mine", None)
    assert second.question == ({"role": "system", "content": "s"}, {"role": "user", "content": "é"})
    assert (third.id, third.answer) == ("problems/2", "2")


def test_jsonl_skips_blank_lines_and_reads_no_further_than_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"question": "q", "answer": "1"}\n\n{"question": "r", "answer": "2"}\nbroken\n')
    assert [row.question for row in read_rows(path, field="data.train", limit=2)] == ["q", "r"]
    with pytest.raises(UserError, match=r"data\.train=.*a\.jsonl: line 5 is not JSON"):
        read_rows(path, field="data.train")


def test_an_empty_answer_among_others_is_kept_for_the_grader_to_reject(tmp_path: Path) -> None:
    rows = [math_row(0, "First?", "", "so \\boxed{}."), math_row(1, "Second?", "7", "")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [row.answer for row in read_rows(tmp_path / "a.parquet", field="data.train")] == ["", "7"]


def test_saved_hf_data_set(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list([{"problem": f"q{n}", "answer": str(n), "level": 3} for n in range(4)])
    data.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "both"))
    rows = read_rows(tmp_path / "one", field="data.train", limit=3)
    assert [(row.id, row.question, row.answer) for row in rows] == [("one/0", "q0", "0"), ("one/1", "q1", "1"), ("one/2", "q2", "2")]
    assert rows[0].extra == {"level": 3}
    with pytest.raises(UserError, match=r"evaluation\.benchmarks\.x=.*both: a data set with the splits train, test; give .*both/train"):
        read_rows(tmp_path / "both", field="evaluation.benchmarks.x")
    assert len(read_rows(tmp_path / "both" / "test", field="data.train")) == 4


def test_nothing_is_written_beside_the_data(math_file: Path) -> None:
    before = sorted(math_file.parent.iterdir())
    read_rows(math_file, field="data.train")
    assert sorted(math_file.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"it has no rows; give a file with a problem in `question`"),
        ([{"question": "q", "level": 1}], r"no answers in its columns question, level; give .*`answer`"),
        ([{"text": "q", "answer": "1"}], r"no questions in its columns text, answer; give .*`question`"),
        ([{"question": "q", "answer": ""}, {"question": "r", "answer": " "}], r"no answers in its columns question, answer"),
        ([{"question": "q", "solution": "no box"}], r"no answers in its columns question, solution"),
        ([{"question": "q", "answer": "1"}, {"question": "r", "answer": None}], r"1 of 2 rows have no answer, the first is row 1"),
        ([{"question": "q", "answer": "1"}, {"answer": "2"}], r"1 of 2 rows have no question, the first is row 1"),
        ([{"id": 1, "question": "q", "answer": "1"}] * 2, r"rows 0 and 1 have the same id '1'"),
        ([{"question": "q", "answer": ["1"]}], r"row 0: answer is list \['1'\]; write a text or a number"),
        ([{"question": ["q"], "answer": "1"}], r"row 0: question is neither a text nor a list of messages"),
        ([{"prompt": [{"role": "assistant", "content": "a"}], "answer": "1"}], r"roles assistant; the last must be user"),
        (["text"], r"line 1 is not a JSON object"),
    ],
)
def test_unusable_jsonl(write_jsonl: Write, rows: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"(?s)^data\.train=.*problems\.jsonl: .*{message}"):
        read_rows(write_jsonl(*rows), field="data.train")


def test_parquet_without_answers(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["q"], "level": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: no answers in its columns prompt, level"):
        read_rows(tmp_path / "a.parquet", field="data.train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"broken", "not a readable parquet file"),
        ("a.jsonl", b"\xff\xfe\x00", "not readable as UTF-8 text"),
        ("a.csv", b"question,answer\n", r"unknown suffix '\.csv'; give a \.parquet or \.jsonl file"),
    ],
)
def test_a_broken_or_unknown_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^data\.train=.*{name}: {message}"):
        read_rows(tmp_path / name, field="data.train")


def test_a_missing_file_and_a_directory_that_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.train=.*absent\.parquet: no such file"):
        read_rows(tmp_path / "absent.parquet", field="data.train")
    with pytest.raises(UserError, match=r"^data\.train=.*: not a data set saved with save_to_disk"):
        read_rows(tmp_path, field="data.train")


def test_every_problem_of_the_benchmarks_has_an_answer(benchmark_data: Path) -> None:
    real = bool(os.environ.get("MEGATRON_NSR_DATA"))
    for name, count in {"math/train": 7500, "math/test": 5000, "aime2025/test": 30, "amc23/test": 40}.items():
        path = benchmark_data / f"{name}.parquet"
        rows = read_rows(path, field="data.train")
        assert len(rows) == len({row.id for row in rows}) == (count if real else pq.read_metadata(path).num_rows)
        # Two solutions of the real training file end in an empty box, and their targets are empty too.
        empty = [5341, 5343] if real and name == "math/train" else []
        assert [index for index, row in enumerate(rows) if not row.answer.strip()] == empty
