r"""MATH-style problems in the tiny model's words: `compute 3+7*2` is answered by `\boxed{17}`. May import: the puzzle.

Unlike the puzzle these have one right value and the usual precedence, so that math-verify can grade them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from examples.quickstart.puzzle import Ranges, running_values

COMPUTE = "compute "
# Two operators whose calculation can be written as a chain; in a+b*c the product is written first.
FORMS = ("+*", "*+", "*-", "++", "+-", "-+")


@dataclass(frozen=True, slots=True)
class Expression:
    """Three numbers and the two operators between them."""

    numbers: tuple[int, int, int]
    operators: str

    @property
    def question(self) -> str:
        a, b, c = self.numbers
        return f"{COMPUTE}{a}{self.operators[0]}{b}{self.operators[1]}{c}"

    @property
    def chain(self) -> tuple[tuple[int, int, int], str]:
        """Numbers and operators in the order in which they are calculated, left to right."""
        a, b, c = self.numbers
        return ((b, c, a), "*+") if self.operators == "+*" else (self.numbers, self.operators)

    @property
    def value(self) -> int:
        return running_values(*self.chain)[-1]


def generate(rng: random.Random, ranges: Ranges) -> Expression:
    """A random expression all of whose values lie within the ranges."""
    while True:
        a, b, c = (rng.randint(1, ranges.largest_operand) for _ in range(3))
        expression = Expression((a, b, c), rng.choice(FORMS))
        if all(0 <= value <= ranges.largest_value for value in running_values(*expression.chain)):
            return expression


def make_problems(ranges: Ranges, count: int, seed: int) -> tuple[Expression, ...]:
    """Distinct random expressions. Raises ValueError where the ranges do not hold that many."""
    rng = random.Random(seed)
    found: dict[Expression, None] = {}
    for _ in range(100 * count):
        found.setdefault(generate(rng, ranges))
        if len(found) == count:
            return tuple(found)
    raise ValueError(f"found only {len(found)} distinct expressions of {count} in {ranges}: ask for fewer, or widen the ranges")
