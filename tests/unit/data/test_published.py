"""MATH, AIME and AMC as they are published become one shape."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_nsr.data.published import Problem, draw_validation, read_published, without
from megatron_nsr.types import UserError

Write = Callable[..., Path]
MATH = {"problem": "What is $1+1$?", "level": "Level 2", "type": "Algebra", "solution": r"It is $\boxed{2}$, not 3."}


def problem(text: str, name: str = "p") -> Problem:
    return Problem(id=name, source="", question=text, answer="1", solution=None, level=None, type=None)


def shape(path: Path) -> tuple[Any, ...]:
    """All but id and source of the only problem."""
    (found,) = read_published(path, field="--train", source="X")
    assert (found.id, found.source) == ("X/0", "X")
    return found.question, found.answer, found.solution, found.level, found.type


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (MATH, ("What is $1+1$?", "2", MATH["solution"], "Level 2", "Algebra")),
        (
            {
                "problem": "p",
                "solution": r"\boxed{7}",
                "answer": "7",
                "subject": "Geometry",
                "level": 5,
                "unique_id": "test/geometry/1.json",
            },
            ("p", "7", r"\boxed{7}", "Level 5", "Geometry"),
        ),
        ({**MATH, "solution": r"Nothing: $\boxed{}$."}, ("What is $1+1$?", "", r"Nothing: $\boxed{}$.", "Level 2", "Algebra")),
        ({"id": 3, "problem": "p", "answer": 70}, ("p", "70", None, None, None)),
        ({"ID": "2024-I-1", "Problem": "p", "Answer": "070", "Solution": "no box"}, ("p", "070", "no box", None, None)),
        ({"id": 0, "question": " q ", "answer": "27.0", "url": "u"}, ("q", "27", None, None, None)),
        ({"question": "q", "answer": 3.25}, ("q", "3.25", None, None, None)),
        (
            {
                "level": "Level 1",
                "type": "Algebra",
                "prompt": [{"content": "q", "role": "user"}],
                "reward_model": {"ground_truth": {"question": "q", "solution": r"\boxed{\frac12}", "target": "2"}, "style": "rule"},
            },
            ("q", r"\frac12", r"\boxed{\frac12}", "Level 1", "Algebra"),
        ),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_each_format_becomes_one_shape(tmp_path: Path, record: dict[str, Any], expected: tuple[Any, ...], suffix: str) -> None:
    path = tmp_path / f"problems{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([record]), path)
    else:
        path.write_text(json.dumps(record) + "\n")
    assert shape(path) == expected


def test_a_tree_of_files_is_read_in_path_order(tmp_path: Path) -> None:
    for name in ("geometry/2", "algebra/1", "algebra/3"):
        path = tmp_path / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**MATH, "problem": name}))
    (tmp_path / "README.txt").write_text("not a problem")
    found = read_published(tmp_path, field="--train", source="MATH")
    assert [(item.id, item.question) for item in found] == [("MATH/0", "algebra/1"), ("MATH/1", "algebra/3"), ("MATH/2", "geometry/2")]


def test_a_saved_data_set_is_read(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list([MATH]).save_to_disk(str(tmp_path / "saved"))
    assert shape(tmp_path / "saved")[1] == "2"


def test_errors_name_file_and_row(tmp_path: Path, write_jsonl: Write) -> None:
    def message(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            read_published(path, field="--train", source="X")
        return str(caught.value)

    assert "a.jsonl: 1 of 2 rows have no answer, the first is row 1" in message(write_jsonl(MATH, {"problem": "p"}, name="a.jsonl"))
    assert "b.jsonl: 1 of 2 rows have no question, the first is row 1" in message(write_jsonl(MATH, {"answer": "p"}, name="b.jsonl"))
    assert "c.jsonl: row 1: level is [5]; write a text or a whole number" in message(
        write_jsonl(MATH, {**MATH, "level": [5]}, name="c.jsonl")
    )
    assert "d.jsonl: row 0: type is ['a']; write a text" in message(write_jsonl({**MATH, "type": ["a"]}, name="d.jsonl"))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert "e.jsonl: row 0: 3 messages, where the problem's text is wanted" in message(
        write_jsonl({"prompt": turns, "answer": 1}, name="e.jsonl")
    )
    (tmp_path / "f.json").write_text("[1]")
    assert "f.json: row 0 is a JSON int, not an object" in message(tmp_path / "f.json")
    (tmp_path / "g.json").write_text("{")
    assert "g.json: not readable as JSON" in message(tmp_path / "g.json")
    (tmp_path / "empty").mkdir()
    assert "no .json, .jsonl, .parquet file in it" in message(tmp_path / "empty")
    assert "--train=" in message(tmp_path / "absent.jsonl") and "no such file" in message(tmp_path / "absent.jsonl")


def test_problems_that_only_look_different_are_the_same() -> None:
    looks = [r"Find $\left( x \right)$ if $x=1$.", r"find $( x )$  if\, $x = 1$.", "Find $(x)$ if\n$x=1$."]
    assert len({problem(text).key for text in looks}) == 1
    assert problem(r"Is $a \leftarrow b$?").key != problem(r"Is $a \arrow b$?").key
    assert problem("Find $x$ if $x=1$.").key != problem("Find $x$ if $x=2$.").key


def test_duplicates_are_left_out_the_first_stays() -> None:
    problems = [problem("a", "1"), problem("b", "2"), problem("A ", "3"), problem("c", "4")]
    assert [item.id for item in without(problems, [problem("$b$")])] == ["1", "4"]


TEXTS = st.lists(st.text("abcdefgh", min_size=1, max_size=4), min_size=1, max_size=20, unique=True)


@given(TEXTS, st.integers(0, 20), st.integers(0, 3), st.randoms(use_true_random=False))
def test_the_split_is_a_partition_that_order_does_not_change(texts: list[str], count: int, seed: int, random: Any) -> None:
    problems = [problem(text, str(index)) for index, text in enumerate(texts)]
    kept, drawn = draw_validation(problems, count, seed)
    assert len(drawn) == min(count, len(problems))
    assert sorted([*kept, *drawn], key=lambda item: int(item.id)) == problems
    shuffled = random.sample(problems, len(problems))
    assert {item.id for item in draw_validation(shuffled, count, seed)[1]} == {item.id for item in drawn}


def test_another_seed_draws_others() -> None:
    problems = [problem(str(number), str(number)) for number in range(100)]
    drawn = [{item.id for item in draw_validation(problems, 20, seed)[1]} for seed in (0, 1)]
    assert len(drawn[0] & drawn[1]) < 15
