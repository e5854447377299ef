"""The corpus: calculations without arithmetic errors, whose mistakes come as often as asked, on problems that are not held out."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.quickstart.arithmetic import Expression, make_problems
from examples.quickstart.corpus import Author, make_corpus, write_attempt, write_calculation, write_response
from examples.quickstart.puzzle import Problem, Ranges, generate, make_splits, solves

FLAWLESS = Author(right=1.0, box_wrong=0.0, doubt_right=0.0, slip=0.0)


def boxed(response: str) -> str:
    return response.rpartition("\\boxed{")[2].removesuffix("}")


def steps(response: str) -> list[tuple[int, str, int, int]]:
    """Every written step as (left, operator, right, result); a result is the next step's left side."""
    return [(int(a), o, int(b), int(c)) for a, o, b, c in re.findall(r"(?=\b(\d+)([-+*])(\d+)=(\d+))", response)]


def test_an_attempt_is_written_as_a_chain() -> None:
    assert write_attempt((3, 7, 2), "+*") == "try 3+7=10*2=20"


@given(st.integers(0, 2**32), st.integers(2, 4))
def test_every_written_step_is_right_and_the_box_has_an_operator_for_each_gap(seed: int, numbers: int) -> None:
    rng, ranges = random.Random(seed), Ranges(numbers=numbers)
    problem = generate(rng, ranges)
    response = write_response(rng, problem, ranges, Author())
    written = steps(response)
    assert len(written) == (numbers - 1) * (response.count(" no ") + 1)
    for left, operator, right, result in written:
        assert result == {"+": left + right, "-": left - right, "*": left * right}[operator]
    assert len(boxed(response)) == numbers - 1
    assert 1 <= response.count("try ") <= Author().tries


@given(st.integers(0, 2**32))
def test_a_flawless_author_solves_at_once(seed: int) -> None:
    rng = random.Random(seed)
    problem = generate(rng, Ranges())
    response = write_response(rng, problem, Ranges(), FLAWLESS)
    assert response.count("try ") == 1 and solves(problem, boxed(response))


def test_mistakes_come_as_often_as_asked() -> None:
    rng, ranges, size = random.Random(0), Ranges(), 4000
    examples = list(make_corpus(rng, ranges, Author(), size, 0.0, frozenset()))
    solved = sum(isinstance(e.question, Problem) and solves(e.question, boxed(e.response)) for e in examples) / size
    slipped = sum(
        isinstance(e.question, Problem) and write_attempt(e.question.numbers, boxed(e.response)) not in e.response for e in examples
    )
    assert 0.5 < solved < 0.7
    assert slipped / size == pytest.approx(Author().slip, abs=0.03)


def test_no_held_out_problem_is_in_the_corpus_and_the_shares_are_kept() -> None:
    ranges = Ranges()
    splits, expressions = make_splits(ranges, 256, 100, 100, seed=1), make_problems(ranges, 64, seed=2)
    held_out = frozenset([*splits.all, *expressions])
    examples = list(make_corpus(random.Random(0), ranges, Author(), 3000, 0.2, held_out))
    assert not held_out & {example.question for example in examples}
    share = sum(isinstance(example.question, Expression) for example in examples) / len(examples)
    assert share == pytest.approx(0.2, abs=0.03)


def test_holding_everything_out_is_an_error() -> None:
    ranges = Ranges(numbers=2, largest_operand=2)
    everything = make_splits(ranges, 10, 0, 0, seed=0).all
    with pytest.raises(ValueError, match="nearly every question of these ranges is held out"):
        list(make_corpus(random.Random(0), ranges, Author(), 1, 0.0, everything))


def test_an_expression_is_calculated_with_the_usual_precedence() -> None:
    expression = Expression((3, 7, 2), "+*")
    assert (expression.question, expression.value) == ("compute 3+7*2", 17)
    assert write_calculation(expression) == r"try 7*2=14+3=17 \boxed{17}"


def test_every_expression_has_the_value_that_python_gives_it() -> None:
    for expression in make_problems(Ranges(), 300, seed=3):
        assert expression.value == eval(expression.question.removeprefix("compute "))
        assert boxed(write_calculation(expression)) == str(expression.value)


def test_more_expressions_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="distinct expressions of 1000"):
        make_problems(Ranges(largest_operand=2), 1000, seed=0)
