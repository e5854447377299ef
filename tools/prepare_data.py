"""Writes training, validation and test problems as parquet files of our schema from MATH, AIME and AMC as they are published.

    python tools/prepare_data.py --train MATH=MATH/train --test MATH=MATH/test --test AIME2025=aime2025.jsonl --test AMC23=amc23.parquet \\
        --out data --validation 500 --seed 0

OUT gets train.parquet, validation.parquet (drawn from the training problems) and NAME.parquet for each test set. Training problems that
stand in a test set, that repeat another one or that have no answer are left out and counted; test sets stay whole. The same input and
seed give the same files. docs/data.md has the formats. Exit status: 0 done; 2 wrong input.

May import: megatron_nsr.data, megatron_nsr.observability, typer.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.table import Table

from megatron_nsr.data.published import Problem, draw_validation, read_published, without
from megatron_nsr.observability.run_directory import replacing
from megatron_nsr.types import UserError

TRAIN, VALIDATION = "train", "validation"
SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "source", "question", "answer", "solution", "level", "type")])
NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*)=(.+)", re.DOTALL)


def prepare(train: list[str], test: list[str], validation: int, seed: int) -> dict[str, list[Problem]]:
    """The problems of each file to write, by its name; prints what was left out. train, test: as NAME=PATH.

    Raises UserError naming what is wrong, file and row included.
    """
    sets = _named("--test", test)
    for name, _ in sets:
        if name in (TRAIN, VALIDATION):
            raise UserError(f"--test={name}: this name is taken by the training problems; choose another")
    tests = {name: _answered(path, name) for name, path in sets}
    read = [problem for name, path in _named("--train", train) for problem in read_published(path, field="--train", source=f"{name}/train")]
    answered = [problem for problem in read if problem.answer]
    fresh = without(answered, [problem for problems in tests.values() for problem in problems])
    distinct = without(answered, [])
    if validation >= len(fresh):
        raise UserError(f"--validation={validation}: only {len(fresh)} training problems are left to draw from")
    kept, drawn = draw_validation(fresh, validation, seed)
    table = Table("", "problems")
    for name, count in (
        ("read for training", len(read)),
        ("  without an answer", len(read) - len(answered)),
        ("  repeating another", len(answered) - len(distinct)),
        ("  in a test set", len(distinct) - len(fresh)),
        (TRAIN, len(kept)),
        (VALIDATION, len(drawn)),
        *((name, len(problems)) for name, problems in tests.items()),
    ):
        table.add_row(name, str(count))
    Console().print(table)
    return {TRAIN: kept, **({VALIDATION: drawn} if drawn else {}), **tests}


def write_problems(path: Path, problems: list[Problem]) -> None:
    """Writes them as parquet, atomically."""
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist([asdict(problem) for problem in problems], schema=SCHEMA), temporary)


def _named(option: str, values: list[str]) -> list[tuple[str, Path]]:
    """NAME=PATH, each name once."""
    found: list[tuple[str, Path]] = []
    for value in values:
        match = NAMED.fullmatch(value)
        if match is None:
            raise UserError(f"{option}={value}: write it as NAME=PATH, such as MATH=MATH/train")
        if match[1] in dict(found):
            raise UserError(f"{option}={value}: the name {match[1]} stands there twice")
        found.append((match[1], Path(match[2])))
    return found


def _answered(path: Path, name: str) -> list[Problem]:
    """A test set; each of its problems needs an answer."""
    problems = read_published(path, field="--test", source=name)
    for problem in problems:
        if not problem.answer:
            raise UserError(f"--test={path}: row {problem.id.rpartition('/')[2]} has an empty answer, and a test set is not shortened")
    return problems


def main(
    train: Annotated[list[str], typer.Option(help="NAME=PATH of training problems; may be repeated")],
    out: Annotated[Path, typer.Option(help="directory of the written files")],
    test: Annotated[list[str] | None, typer.Option(help="NAME=PATH of a test set; may be repeated")] = None,
    validation: Annotated[int, typer.Option(min=0, help="training problems that become validation.parquet")] = 500,
    seed: Annotated[int, typer.Option(min=0, help="which problems are drawn for validation")] = 0,
) -> None:
    """Problems as published to train.parquet, validation.parquet and one file a test set."""
    try:
        if out.exists() and not out.is_dir():
            raise UserError(f"--out={out}: is a file; name a directory")
        for name, problems in prepare(train, test or [], validation, seed).items():
            write_problems(out / f"{name}.parquet", problems)
    except UserError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
