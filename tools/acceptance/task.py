r"""Chains of sums that a model writes out step by step: `compute 3+7-2` is answered by `try 3+7=10-2=8 \boxed{8}`.

May import: examples.quickstart, the standard library. As many numbers as one likes make prompts and responses as long as one likes, and a
model learns the form within a hundred steps: its responses end, some are right, and its distributions are those of a trained model.
"""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

from examples.quickstart.arithmetic import COMPUTE
from examples.quickstart.corpus import BOX, END, write_attempt
from examples.quickstart.puzzle import Ranges
from examples.quickstart.tokenizer import EOS_ID, PAD_ID, train_tokenizer

__all__ = ["EOS_ID", "PAD_ID", "one_problem", "prompt_tokens", "response_tokens", "tokenizer_bytes", "write_problems"]

RANGES = Ranges()


def prompt_tokens(numbers: int) -> int:
    """`compute `, the first number, and a token for each further one."""
    return numbers + 1


def response_tokens(numbers: int) -> int:
    """`try `, the first number, step and result for each further one, the box with its number, the stop id."""
    return 2 * numbers + 4


def one_problem(draw: random.Random, numbers: int) -> dict[str, Any]:
    """A row of a data file. Every value on the way lies within what the tokenizer has a word for."""
    value = draw.randint(1, RANGES.largest_operand)
    terms, operators = [value], ""
    for _ in range(numbers - 1):
        term = draw.randint(1, RANGES.largest_operand)
        results = {"+": value + term, "-": value - term}
        operators += draw.choice([sign for sign, result in results.items() if 0 <= result <= RANGES.largest_value])
        terms.append(term)
        value = results[operators[-1]]
    question = COMPUTE + str(terms[0]) + "".join(f"{sign}{term}" for sign, term in zip(operators, terms[1:], strict=True))
    return {"question": question, "answer": str(value), "response": write_attempt(tuple(terms), operators) + BOX + str(value) + END}


def write_problems(file: Path, *, numbers: int, count: int, seed: int) -> Path:
    """JSON lines with question, answer and a right response."""
    draw = random.Random(seed)
    rows = ({"id": f"chain-{seed}-{index}", **one_problem(draw, numbers)} for index in range(count))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@cache
def tokenizer_bytes() -> bytes:
    """One id for each word of the task."""
    draw = random.Random(0)
    rows = [one_problem(draw, 12) for _ in range(200)]
    return train_tokenizer((text for row in rows for text in (row["question"], row["response"])), RANGES)
