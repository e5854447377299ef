"""The operator puzzle: what it generates can be solved, what it calls a solution is one, and its splits do not overlap."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.quickstart.puzzle import (
    OPERATORS,
    Problem,
    Ranges,
    generate,
    make_splits,
    running_values,
    solutions,
    solves,
    writable_solutions,
)

RANGES = st.builds(Ranges, numbers=st.integers(2, 5), largest_operand=st.integers(2, 12), largest_value=st.integers(12, 60))


def left_to_right(numbers: tuple[int, ...], operators: str) -> int:
    """Python's own arithmetic, bracketed from the left."""
    text = "(" * (len(numbers) - 1) + str(numbers[0]) + "".join(f"{o}{n})" for o, n in zip(operators, numbers[1:], strict=True))
    return int(eval(text))


@given(st.lists(st.integers(1, 20), min_size=2, max_size=5), st.data())
def test_values_are_those_of_python_bracketed_from_the_left(numbers: list[int], data: st.DataObject) -> None:
    operators = data.draw(st.text(OPERATORS, min_size=len(numbers) - 1, max_size=len(numbers) - 1))
    values = running_values(tuple(numbers), operators)
    assert values == tuple(left_to_right(tuple(numbers[: i + 1]), operators[:i]) for i in range(len(numbers)))
    assert solves(Problem(tuple(numbers), values[-1]), operators)
    assert not solves(Problem(tuple(numbers), values[-1] + 1), operators)


@given(RANGES, st.integers(0, 2**32))
def test_a_generated_problem_lies_in_its_ranges_and_can_be_written_out(ranges: Ranges, seed: int) -> None:
    problem = generate(random.Random(seed), ranges)
    assert len(problem.numbers) == ranges.numbers
    assert all(1 <= number <= ranges.largest_operand for number in problem.numbers)
    right = writable_solutions(problem, ranges)
    assert right and set(right) <= set(solutions(problem))
    assert all(0 <= value <= ranges.largest_value for operators in right for value in running_values(problem.numbers, operators))


@given(RANGES, st.integers(0, 2**32))
def test_solutions_are_all_and_only_the_operators_that_reach_the_target(ranges: Ranges, seed: int) -> None:
    problem = generate(random.Random(seed), ranges)
    right = set(solutions(problem))
    guesses = {"".join(random.Random(i).choices(OPERATORS, k=ranges.numbers - 1)) for i in range(20)}
    assert {guess for guess in guesses if left_to_right(problem.numbers, guess) == problem.target} == guesses & right


def test_a_solution_may_pass_through_values_that_the_corpus_never_writes() -> None:
    problem = Problem((2, 5, 7), 4)
    assert solutions(problem) == ["-+"]
    assert writable_solutions(problem, Ranges()) == []


def test_the_question_reads_as_a_gap_text() -> None:
    assert Problem((3, 7, 2), 20).question == "3?7?2=20"


@pytest.mark.parametrize("operators", ["", "+", "+++"])
def test_a_wrong_number_of_operators_is_an_error(operators: str) -> None:
    with pytest.raises(ValueError, match=f"3 numbers need 2 operators, not {len(operators)}"):
        running_values((3, 7, 2), operators)


def test_an_unknown_operator_is_an_error() -> None:
    with pytest.raises(ValueError, match="operator '/': must be one of"):
        solves(Problem((3, 7, 2), 20), "+/")


@given(st.integers(0, 2**32))
def test_splits_are_disjoint_of_the_asked_size_and_the_same_for_the_same_seed(seed: int) -> None:
    splits = make_splits(Ranges(), train=40, validation=20, test=10, seed=seed)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (40, 20, 10)
    assert len(splits.all) == 70
    assert splits == make_splits(Ranges(), train=40, validation=20, test=10, seed=seed)


def test_more_training_problems_leave_the_test_problems_alone() -> None:
    few, many = (make_splits(Ranges(), train=size, validation=100, test=100, seed=7) for size in (50, 256))
    assert (few.test, few.validation) == (many.test, many.validation)
    assert few.train == many.train[:50]


def test_ranges_that_hold_too_few_problems_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"found only \d+ distinct problems of 100"):
        make_splits(Ranges(numbers=2, largest_operand=2), train=80, validation=10, test=10, seed=0)


def test_impossible_ranges_are_an_error() -> None:
    with pytest.raises(ValueError, match="needs numbers >= 2"):
        Ranges(numbers=1)
    with pytest.raises(ValueError, match="largest_operand <= largest_value"):
        Ranges(largest_operand=10, largest_value=9)
