"""Problems as MATH, AIME and AMC are published, in one shape; duplicates found, a validation split drawn.

May import: types, rewards and the rest of data.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_nsr.data.sources import Row, read_records, rows_of
from megatron_nsr.types import UserError

SUFFIXES = (".json", ".jsonl", ".parquet")
_LOOKS = re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\[,;:! ]|[\s$~]")  # what changes how a problem looks and not what it asks
_WHOLE = re.compile(r"(-?[0-9]+)\.0+")


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem, its fields named as the columns of the files that we write; docs/data.md says what each is."""

    id: str
    source: str
    question: str
    answer: str
    solution: str | None
    level: str | None
    type: str | None

    @property
    def key(self) -> str:
        """The same for problems that ask the same in the same words, however they are typeset."""
        return _LOOKS.sub("", unicodedata.normalize("NFKC", self.question)).casefold()


def read_published(path: Path, *, field: str, source: str) -> list[Problem]:
    """The problems of a .json, .jsonl or .parquet file, of a saved HF data set, or of all such files below a directory, in path order.

    Read are `problem`, `question` or `prompt`; `solution`, whose last box is the answer, else `answer`; `level`; `type` or `subject`; or
    what `read_rows` reads; capitals in column names do not matter. A .json file holds one object (as MATH's own archive has them) or
    a list of them. Problems are called source/0, source/1, ... An answer that is there but empty stays "".

    Raises UserError naming file and row.
    """
    rows = [item for file in _files(path, f"{field}={path}") for item in _rows(file, f"{field}={file}")]
    return [_problem(f"{source}/{index}", source, *item) for index, item in enumerate(rows)]


def without(problems: Sequence[Problem], others: Sequence[Problem]) -> list[Problem]:
    """Those of `problems` that neither stand in `others` nor repeat an earlier one of themselves."""
    seen = {problem.key for problem in others}
    first = {problem.key: problem for problem in reversed(problems)}
    return [problem for problem in problems if problem.key not in seen and first[problem.key] is problem]


def draw_validation(problems: Sequence[Problem], count: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """(the others, `count` of them), both in their order. Which are drawn depends on the seed and the texts, not on their order."""
    ranked = sorted(problems, key=lambda problem: hashlib.blake2b(f"{seed}\0{problem.key}".encode()).digest())
    drawn = {problem.id for problem in ranked[:count]}
    return [p for p in problems if p.id not in drawn], [p for p in problems if p.id in drawn]


def _files(path: Path, place: str) -> list[Path]:
    if not path.is_dir() or (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return [path]  # a file, or what save_to_disk wrote
    found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
    if not found:
        raise UserError(f"{place}: no {', '.join(SUFFIXES)} file in it")
    return found


def _rows(file: Path, place: str) -> Iterator[tuple[Row, dict[str, Any], str]]:
    """(row, its record, how messages name it)"""
    records = _json_records(file, place) if file.suffix == ".json" and file.is_file() else read_records(file, place)
    records = [_lower(record) for record in records]
    for index, (row, record) in enumerate(zip(rows_of(records, place, file.stem, all_may_be_empty=True), records, strict=True)):
        yield row, record, f"{place}: row {index}"


def _lower(record: dict[str, Any]) -> dict[str, Any]:
    """Column names in lower case; a solution without a box (two of MATH's have an empty one) and no answer beside it is an empty answer."""
    lower = {key.lower(): value for key, value in record.items()}
    return {**lower, "answer": ""} if isinstance(lower.get("solution"), str) and lower.get("answer") is None else lower


def _json_records(file: Path, place: str) -> list[dict[str, Any]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{place}: not readable as JSON ({error})") from None
    records = content if isinstance(content, list) else [content]
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise UserError(f"{place}: row {index} is a JSON {type(record).__name__}, not an object")
    return records


def _problem(identity: str, source: str, row: Row, record: dict[str, Any], place: str) -> Problem:
    if not isinstance(row.question, str) and len(row.question) != 1:
        raise UserError(f"{place}: {len(row.question)} messages, where the problem's text is wanted; the template brings the others")
    question = row.question if isinstance(row.question, str) else row.question[0]["content"]
    truth = (record.get("reward_model") or {}).get("ground_truth")
    solution = record.get("solution") or (truth.get("solution") if isinstance(truth, dict) else None)
    whole = _WHOLE.fullmatch(row.answer.strip())
    return Problem(
        id=identity,
        source=source,
        question=question.strip(),
        answer=whole[1] if whole else row.answer.strip(),
        solution=solution if isinstance(solution, str) else None,
        level=_level(record.get("level"), place),
        type=_subject(record, place),
    )


def _level(value: Any, place: str) -> str | None:
    """`Level 3`, however it is given."""
    if value is None or (isinstance(value, str) and value.strip()):
        return f"Level {value}" if isinstance(value, str) and value.isdigit() else value
    if isinstance(value, int) and not isinstance(value, bool):
        return f"Level {value}"
    raise UserError(f"{place}: level is {value!r}; write a text or a whole number")


def _subject(record: dict[str, Any], place: str) -> str | None:
    value = record.get("type") or record.get("subject")
    if value is None or isinstance(value, str):
        return value
    raise UserError(f"{place}: type is {value!r}; write a text")
