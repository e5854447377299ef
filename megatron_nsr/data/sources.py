"""Problem rows from parquet, JSONL or a saved Hugging Face data set, in one shape, whatever their columns are called.

May import: types, rewards.extraction; pyarrow and datasets are imported when a file is read.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_nsr.data.templates import Message
from megatron_nsr.rewards.extraction import last_boxed
from megatron_nsr.types import UserError

QUESTION_COLUMNS = ("question", "problem", "prompt")  # the first that a file has is read
ANSWER_COLUMNS = ("answer", "target", "ground_truth")  # likewise, after a boxed solution
SOURCE_COLUMNS = ("source", "data_source")
ROLES = ("system", "user", "assistant")
_SCHEMA = "a problem in `question`, `problem` or `prompt`, and its answer in `answer`, `solution` (boxed) or `reward_model.ground_truth`"


@dataclass(frozen=True, slots=True)
class Row:
    """One problem as the file has it, before any template."""

    id: str
    question: str | tuple[Message, ...]
    answer: str
    source: str
    response: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)  # the columns that are not read here


def read_rows(path: str | Path, *, field: str, limit: int | None = None) -> tuple[Row, ...]:
    """Reads the first `limit` rows of a .parquet or .jsonl file or of a data set saved with `save_to_disk`, in the file's order.

    The answer is the last balanced box of the row's `solution` where it has one, else the ground truth, target or answer. An answer
    that is there but empty (two rows of MATH's training file) stays "": a grader gives it no verdict.
    A row without an id is called source/index, its index counted in the file from 0. Nothing is cached on disk.

    Raises UserError naming `field` (the config field that holds the path), the path and what would be right: no such file,
    an unknown suffix, a broken file, no rows, no question or answer, two rows with one id.
    """
    place = f"{field}={path}"
    rows = rows_of(read_records(Path(path), place, limit), place, Path(path).stem)
    seen: dict[str, int] = {}
    for index, row in enumerate(rows):
        if row.id in seen:
            raise UserError(
                f"{place}: rows {seen[row.id]} and {index} have the same id {row.id!r}; make ids unique or leave the column out"
            )
        seen[row.id] = index
    return rows


def rows_of(records: list[dict[str, Any]], place: str, stem: str, *, all_may_be_empty: bool = False) -> tuple[Row, ...]:
    """The rows that the records of one file describe; see `read_rows`.

    place: the file, as messages name it; stem: its name; all_may_be_empty: takes a file whose every answer is empty, one of many.
    """
    if not records:
        raise UserError(f"{place}: it has no rows; give a file with {_SCHEMA}")
    return tuple(_Reader(place, stem, records, all_may_be_empty).rows())


class _Reader:
    """Finds the columns of one file, then turns its records into rows."""

    def __init__(self, place: str, stem: str, records: list[dict[str, Any]], all_may_be_empty: bool) -> None:
        self._place, self._stem, self._records, self._all_may_be_empty = place, stem, records, all_may_be_empty
        self._columns = list(dict.fromkeys(itertools.chain.from_iterable(records)))

    def rows(self) -> list[Row]:
        questions = self._collect("question", lambda record: _first(record, QUESTION_COLUMNS))
        answers = self._collect("answer", _answer)
        return [self._row(index, record, questions[index], answers[index]) for index, record in enumerate(self._records)]

    def _collect(self, what: str, get: Callable[[dict[str, Any]], tuple[str, Any] | None]) -> list[tuple[str, Any]]:
        """(column, value) of every row; all rows must have one."""
        found = [get(record) for record in self._records]
        if not any(item and (item[1] != "" or self._all_may_be_empty) for item in found):
            raise UserError(f"{self._place}: no {what}s in its columns {', '.join(self._columns)}; give {_SCHEMA}")
        missing = [index for index, item in enumerate(found) if item is None]
        if missing:
            raise UserError(f"{self._place}: {len(missing)} of {len(found)} rows have no {what}, the first is row {missing[0]}")
        return [item for item in found if item is not None]

    def _row(self, index: int, record: dict[str, Any], question: tuple[str, Any], answer: tuple[str, Any]) -> Row:
        source = _first(record, SOURCE_COLUMNS)
        name = self._text(index, *source) if source else self._stem
        response = record.get("response")
        used = {"id", question[0], "reward_model", "response", *SOURCE_COLUMNS}
        if answer[0] != "solution":  # of which only the box is used
            used.add(answer[0])
        return Row(
            id=f"{name}/{index}" if record.get("id") is None else self._text(index, "id", record["id"]),
            question=self._question(index, *question),
            answer=self._text(index, *answer),
            source=name,
            response=None if response is None else self._text(index, "response", response),
            extra={key: value for key, value in record.items() if key not in used},
        )

    def _text(self, index: int, column: str, value: Any) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        raise UserError(f"{self._place}: row {index}: {column} is {type(value).__name__} {value!r}; write a text or a number")

    def _question(self, index: int, column: str, value: Any) -> str | tuple[Message, ...]:
        if isinstance(value, str):
            return value
        if not isinstance(value, list) or not all(_is_message(item) for item in value):
            raise UserError(
                f"{self._place}: row {index}: {column} is neither a text nor a list of messages "
                f"with `role` ({', '.join(ROLES)}) and `content`"
            )
        roles = [item["role"] for item in value]
        if roles[-1] != "user" or "system" in roles[1:]:
            raise UserError(
                f"{self._place}: row {index}: {column} has the roles {', '.join(roles)}; "
                "the last must be user, and only the first may be system"
            )
        return tuple(Message(role=item["role"], content=item["content"]) for item in value)


def _answer(record: dict[str, Any]) -> tuple[str, Any] | None:
    """(column, answer) by the gold-answer rule; the answer is "" where it is there but empty, and None where nothing is there.

    `target` is the last resort beside a solution: in the MATH files of arXiv 2506.01347's repository it lost backslashes in 97 test rows.
    """
    reward = record.get("reward_model")
    truth = reward.get("ground_truth") if isinstance(reward, dict) else None
    nested = truth if isinstance(truth, dict) else {"ground_truth": truth}
    for solution in (nested.get("solution"), record.get("solution")):
        box = last_boxed(solution) if isinstance(solution, str) else None
        if box is not None and box.strip():
            return "solution", box
    found = _first(nested, ANSWER_COLUMNS)
    found = ("reward_model", found[1]) if found else _first(record, ANSWER_COLUMNS)
    if found is None and any(values.get(column) is not None for values in (nested, record) for column in ANSWER_COLUMNS):
        return "answer", ""
    return found


def _first(record: Mapping[str, Any], columns: tuple[str, ...]) -> tuple[str, Any] | None:
    """The first of the columns that holds something, and what it holds."""
    for column in columns:
        value = record.get(column)
        if value is not None and value != [] and str(value).strip():
            return column, value
    return None


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and value.get("role") in ROLES and isinstance(value.get("content"), str)


def read_records(path: Path, place: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The first `limit` records of a file or saved data set, as they stand there; raises UserError as `read_rows` does."""
    if not path.exists():
        raise UserError(f"{place}: no such file or directory")
    if path.is_dir():
        return _read_saved(path, place, limit)
    if path.suffix == ".parquet":
        return _read_parquet(path, place, limit)
    if path.suffix == ".jsonl":
        return _read_jsonl(path, place, limit)
    raise UserError(f"{place}: unknown suffix {path.suffix!r}; give a .parquet or .jsonl file, or the directory of a saved HF data set")


def _read_parquet(path: Path, place: str, limit: int | None) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=4096 if limit is None else min(limit, 4096)))
            return list(itertools.islice(itertools.chain.from_iterable(batches), limit))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{place}: not a readable parquet file: {' '.join(str(error).split())}") from None


def _read_jsonl(path: Path, place: str, limit: int | None) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if len(records) == limit:
                    break
                if line.strip():
                    records.append(_json_object(line, place, number))
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{place}: not readable as UTF-8 text: {error}") from None
    return records


def _json_object(line: str, place: str, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: line {number} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{place}: line {number} is not a JSON object; write one object a line with {_SCHEMA}")
    return value


def _read_saved(path: Path, place: str, limit: int | None) -> list[dict[str, Any]]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError, KeyError, OSError) as error:
        raise UserError(f"{place}: not a data set saved with save_to_disk: {' '.join(str(error).split())}") from None
    if isinstance(data, datasets.DatasetDict):
        choices = ", ".join(str(path / split) for split in data)
        raise UserError(f"{place}: a data set with the splits {', '.join(map(str, data))}; give the directory of one: {choices}")
    return list(itertools.islice(data, limit))
