"""tools/prepare_data.py: published files in, files that training and evaluation read out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from pyarrow import parquet
from typer.testing import CliRunner

from megatron_nsr.data.sources import read_rows
from tools.prepare_data import SCHEMA, main

app = typer.Typer()
app.command()(main)


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def math(number: int, **other: Any) -> dict[str, Any]:
    return {"problem": f"What is ${number}$?", "level": "Level 1", "type": "Algebra", "solution": rf"\boxed{{{number}}}", **other}


@pytest.fixture
def published(tmp_path: Path) -> list[str]:
    """8 distinct training problems; beside them one without an answer, one twice, one of the test set."""
    train = write(
        tmp_path / "train.jsonl", *(math(n) for n in range(8)), math(50, solution=r"\boxed{}"), math(3, level="Level 2"), math(100)
    )
    test = write(tmp_path / "test.jsonl", math(100), math(101))
    aime = write(tmp_path / "aime.jsonl", {"problem": "q", "answer": 7})
    return [f"--train=MATH={train}", f"--test=MATH={test}", f"--test=AIME2025={aime}"]


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def test_what_was_published_becomes_files_that_are_read(published: list[str], tmp_path: Path) -> None:
    out = tmp_path / "data"
    status, printed = run(*published, f"--out={out}", "--validation=3", "--seed=1")
    assert status == 0, printed
    rows = {path.stem: read_rows(path, field="data.train") for path in sorted(out.iterdir())}
    assert {name: len(found) for name, found in rows.items()} == {"AIME2025": 1, "MATH": 2, "train": 5, "validation": 3}
    ids = {row.id for name in ("train", "validation") for row in rows[name]}
    assert ids == {f"MATH/train/{index}" for index in range(8)}
    assert rows["AIME2025"][0].answer == "7"
    assert {key: rows["MATH"][0].extra[key] for key in ("level", "type")} == {"level": "Level 1", "type": "Algebra"}
    assert all(parquet.read_schema(path).equals(SCHEMA) for path in out.iterdir())
    for line in ("without an answer │ 1", "repeating another │ 1", "in a test set     │ 1"):
        assert line in printed


def test_the_same_seed_gives_the_same_files(published: list[str], tmp_path: Path) -> None:
    outs = [tmp_path / name for name in ("a", "b", "c")]
    for out, seed in zip(outs, (1, 1, 2), strict=True):
        assert run(*published, f"--out={out}", "--validation=3", f"--seed={seed}")[0] == 0
    first, again, other = (contents(out) for out in outs)
    assert first == again
    assert first["validation.parquet"] != other["validation.parquet"] and first["MATH.parquet"] == other["MATH.parquet"]


def test_wrong_input_is_one_line_and_writes_nothing(published: list[str], tmp_path: Path) -> None:
    out = tmp_path / "data"
    empty = write(tmp_path / "empty.jsonl", math(1), math(2, solution="", answer=""))
    for arguments, message in [
        ([*published, "--validation=8"], "--validation=8: only 8 training problems are left"),
        ([*published, "--test=train=x"], "--test=train: this name is taken"),
        ([published[0], "--test=x.jsonl"], "--test=x.jsonl: write it as NAME=PATH"),
        ([*published, published[1]], "the name MATH stands there twice"),
        ([published[0], f"--test=X={empty}"], f"--test={empty}: row 1 has an empty answer"),
        ([f"--train=X={tmp_path / 'absent.jsonl'}"], "absent.jsonl: no such file"),
        ([published[0], f"--out={empty}"], "is a file; name a directory"),
    ]:
        status, printed = run(f"--out={out}", *arguments)
        assert status == 2 and message in printed.replace("\n", ""), (arguments, printed)
    assert not out.exists()
