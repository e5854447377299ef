r"""What the base model learns from: calculations with recognisable mistakes. May import: the puzzle and the arithmetic problems.

An author tries operators, sees the result, and may stop with a wrong one, doubt a right one, or slip while copying the operators
into the box. A model trained on this solves about a third of the puzzles, and its mistakes can be told from its own text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import TypeVar

from examples.quickstart import arithmetic, puzzle
from examples.quickstart.arithmetic import Expression
from examples.quickstart.puzzle import OPERATORS, Problem, Ranges

Question = Problem | Expression
Drawn = TypeVar("Drawn", Problem, Expression)

TRY, RETRY, BOX, END = "try ", " no ", " \\boxed{", "}"


@dataclass(frozen=True, slots=True)
class Author:
    """How often the imagined author errs; all but `tries` are probabilities."""

    tries: int = 3  # attempts at most; the last is boxed whatever it gave
    right: float = 0.6  # an attempt is a solution, not a blind guess
    box_wrong: float = 0.5  # a wrong attempt is boxed all the same
    doubt_right: float = 0.03  # a right attempt is given up
    slip: float = 0.3  # one operator is copied wrongly into the box


@dataclass(frozen=True, slots=True)
class Example:
    """One supervised pair."""

    question: Question
    response: str


def write_calculation(expression: Expression) -> str:
    """A right answer to an arithmetic question: `try 7*2=14+3=17 \\boxed{17}`."""
    return write_attempt(*expression.chain) + BOX + str(expression.value) + END


def write_attempt(numbers: tuple[int, ...], operators: str) -> str:
    """The calculation in the task's words: `try 3+7=10*2=20`."""
    values = puzzle.running_values(numbers, operators)
    steps = (f"{operator}{number}={value}" for operator, number, value in zip(operators, numbers[1:], values[1:], strict=True))
    return TRY + str(numbers[0]) + "".join(steps)


def write_response(rng: random.Random, problem: Problem, ranges: Ranges, author: Author) -> str:
    """One imperfect answer: attempts, and the last one's operators in a box."""
    results = puzzle.writable_results(problem.numbers, ranges)
    possible, right = list(results), [operators for operators, value in results.items() if value == problem.target]
    text = ""
    for attempt in range(author.tries):
        operators = rng.choice(right if rng.random() < author.right else possible)
        text += write_attempt(problem.numbers, operators)
        stop = 1 - author.doubt_right if operators in right else author.box_wrong
        if attempt == author.tries - 1 or rng.random() < stop:
            break
        text += RETRY
    if rng.random() < author.slip:
        operators = _slip(rng, operators)
    return text + BOX + operators + END


def make_corpus(
    rng: random.Random, ranges: Ranges, author: Author, size: int, arithmetic_share: float, exclude: Container[Question]
) -> Iterator[Example]:
    """`size` examples on questions outside `exclude`; about `arithmetic_share` of them are plain arithmetic, always right.

    Raises ValueError where `exclude` leaves next to nothing of the ranges.
    """
    for _ in range(size):
        if rng.random() < arithmetic_share:
            expression = _draw(lambda: arithmetic.generate(rng, ranges), exclude)
            yield Example(expression, write_calculation(expression))
        else:
            problem = _draw(lambda: puzzle.generate(rng, ranges), exclude)
            yield Example(problem, write_response(rng, problem, ranges, author))


def _draw(generate: Callable[[], Drawn], exclude: Container[Question]) -> Drawn:
    for _ in range(10_000):
        if (question := generate()) not in exclude:
            return question
    raise ValueError("nearly every question of these ranges is held out: hold out fewer, or widen the ranges")


def _slip(rng: random.Random, operators: str) -> str:
    """The same operators with one of them replaced by another."""
    place = rng.randrange(len(operators))
    other = rng.choice(OPERATORS.replace(operators[place], ""))
    return operators[:place] + other + operators[place + 1 :]
