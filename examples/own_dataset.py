r"""Problems of one's own: a CSV table with the columns `numbers` (`3 7 2`), `target` and `operators` becomes a file to train on.

    printf 'numbers,target,operators\n3 7 2,20,+*\n9 5 4,0,--\n' > puzzles.csv       # and 62 more at least, see below
    python -m examples.own_dataset puzzles.csv runs/own/train.jsonl
    megatron-nsr train configs/quickstart.yaml data.train=runs/own/train.jsonl data.validation=32 evaluation.every=10 run.dir=runs/own

The configuration's data and base model are there after `make quickstart`. A step takes `data.prompts_per_step` different problems, 32 in
that configuration, and `data.validation=32` holds out as many: 64 are the fewest here. With `data.prompts_per_step=8 data.validation=8`
it is 16.

A row needs `question` and `answer`. An `id` names it in samples and evaluations; all other columns reach the grader as `prompt.extra`.
docs/data.md has the whole schema. Reading the file back finds what is wrong with it before a run does.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

from examples.quickstart.puzzle import Problem
from megatron_nsr.data.sources import read_rows


def to_row(index: int, record: dict[str, str]) -> dict[str, Any]:
    """One line of the CSV table in the schema."""
    puzzle = Problem(tuple(int(number) for number in record["numbers"].split()), int(record["target"]))
    return {
        "id": f"own/{index}",
        "question": puzzle.question,  # `3?7?2=20`, as the base model knows it
        "answer": record["operators"],
        "numbers": list(puzzle.numbers),  # these two are what the quickstart's grader reads
        "target": puzzle.target,
    }


def convert(table: Path, out: Path) -> int:
    """Writes the file and returns the number of problems that training will read from it."""
    with table.open(newline="", encoding="utf-8") as lines:
        rows = [to_row(index, record) for index, record in enumerate(csv.DictReader(lines))]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(read_rows(out, field="data.train"))


if __name__ == "__main__":
    print(f"{convert(Path(sys.argv[1]), Path(sys.argv[2]))} problems in {sys.argv[2]}")
