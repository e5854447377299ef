r"""The operator puzzle: put + - * between numbers so that, left to right, the result is the target. May import: the standard library.

`3?7?2=20` is solved by `\boxed{+*}`, because (3 + 7) * 2 = 20. There is no operator precedence.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

OPERATORS = "+-*"


@dataclass(frozen=True, slots=True)
class Ranges:
    """What a generated puzzle may contain. A checker does not read these: any operators that reach the target are right."""

    numbers: int = 3  # how many numbers a puzzle has; it asks for one operator less
    largest_operand: int = 9  # numbers are 1 .. largest_operand
    largest_value: int = 49  # every value along the written-out calculation is 0 .. largest_value
    operators: str = OPERATORS  # drawn from this; one that stands here twice comes twice as often

    def __post_init__(self) -> None:
        if self.numbers < 2 or not 1 <= self.largest_operand <= self.largest_value:
            raise ValueError(f"{self}: needs numbers >= 2 and 1 <= largest_operand <= largest_value")


@dataclass(frozen=True, slots=True)
class Problem:
    """One puzzle."""

    numbers: tuple[int, ...]
    target: int

    @property
    def question(self) -> str:
        return "?".join(map(str, self.numbers)) + f"={self.target}"


@dataclass(frozen=True, slots=True)
class Splits:
    """Problems for reinforcement learning and for judging it; no problem is in two of them."""

    train: tuple[Problem, ...]
    validation: tuple[Problem, ...]
    test: tuple[Problem, ...]

    @property
    def all(self) -> frozenset[Problem]:
        return frozenset(self.train + self.validation + self.test)


def running_values(numbers: tuple[int, ...], operators: str) -> tuple[int, ...]:
    """The value after each number, left to right; the last is the result.

    Raises ValueError where `operators` is not one of + - * between each two numbers.
    """
    if len(operators) != len(numbers) - 1:
        raise ValueError(f"{len(numbers)} numbers need {len(numbers) - 1} operators, not {len(operators)}")
    values = [numbers[0]]
    for operator, number in zip(operators, numbers[1:], strict=True):
        values.append(_apply(operator, values[-1], number))
    return tuple(values)


def solves(problem: Problem, operators: str) -> bool:
    """Whether the operators reach the target; whatever values they pass through. Raises ValueError like `running_values`."""
    return running_values(problem.numbers, operators)[-1] == problem.target


def operator_strings(count: int) -> Iterator[str]:
    """Every way to choose `count` operators, in a fixed order."""
    return ("".join(choice) for choice in itertools.product(OPERATORS, repeat=count))


def writable(numbers: tuple[int, ...], operators: str, ranges: Ranges) -> bool:
    """Whether every value along the way lies within the ranges, so that the calculation can be written in the task's words."""
    return all(0 <= value <= ranges.largest_value for value in running_values(numbers, operators))


def writable_results(numbers: tuple[int, ...], ranges: Ranges) -> dict[str, int]:
    """Result by operators, for every way whose values all lie within the ranges, in the order of `operator_strings`."""
    results = {"": numbers[0]}
    for number in numbers[1:]:
        longer = ((operators + each, _apply(each, value, number)) for operators, value in results.items() for each in OPERATORS)
        results = {operators: value for operators, value in longer if 0 <= value <= ranges.largest_value}
    return results


def solutions(problem: Problem) -> list[str]:
    """Every operator string that reaches the target."""
    return [operators for operators in operator_strings(len(problem.numbers) - 1) if solves(problem, operators)]


def writable_solutions(problem: Problem, ranges: Ranges) -> list[str]:
    """The solutions whose calculation can be written out; a generated problem has at least one."""
    return [operators for operators, value in writable_results(problem.numbers, ranges).items() if value == problem.target]


def generate(rng: random.Random, ranges: Ranges) -> Problem:
    """A random problem with at least one writable solution."""
    while True:
        numbers = tuple(rng.randint(1, ranges.largest_operand) for _ in range(ranges.numbers))
        operators = "".join(rng.choice(ranges.operators) for _ in numbers[1:])
        if writable(numbers, operators, ranges):
            return Problem(numbers, running_values(numbers, operators)[-1])


def make_splits(ranges: Ranges, train: int, validation: int, test: int, seed: int) -> Splits:
    """Distinct random problems, test first: a larger training split leaves the test problems as they are.

    Raises ValueError where the ranges do not hold that many problems.
    """
    rng, wanted = random.Random(seed), train + validation + test
    found: dict[Problem, None] = {}
    for _ in range(100 * wanted):
        found.setdefault(generate(rng, ranges))
        if len(found) == wanted:
            break
    else:
        raise ValueError(f"found only {len(found)} distinct problems of {wanted} in {ranges}: ask for fewer, or widen the ranges")
    problems = tuple(found)
    return Splits(test=problems[:test], validation=problems[test : test + validation], train=problems[test + validation :])


def _apply(operator: str, left: int, right: int) -> int:
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    raise ValueError(f"operator {operator!r}: must be one of {OPERATORS}")
