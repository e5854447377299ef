"""cons@k: who votes for what, and how often the majority is right."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nsr.evaluation.votes import COMPARED, Votes, consensus, count_votes, same_by_math_verify
from megatron_nsr.rewards.pool import GraderPool
from megatron_nsr.types import Outcome, Reason, Verdict


def right(answer: str | None) -> Verdict:
    return Verdict(Outcome.CORRECT, Reason.MATCH, answer)


def wrong(answer: str | None) -> Verdict:
    return Verdict(Outcome.WRONG, Reason.MISMATCH if answer else Reason.NO_BOX, answer)


LOST = Verdict(Outcome.NONE, Reason.TIMEOUT)


def never_same(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    return [False] * len(pairs)


def by_enumeration(labels: Sequence[int], correct: Sequence[bool], k: int) -> float:
    """The mean over all subsets of k of the correct share of the leading answers."""
    shares = []
    for subset in combinations(labels, k):
        votes = [label for label in subset if label >= 0]
        most = max((votes.count(label) for label in votes), default=0)
        leaders = {label for label in votes if votes.count(label) == most}
        shares.append(sum(correct[label] for label in leaders) / len(leaders) if leaders else 0.0)
    return float(np.mean(shares))


LABELS = st.lists(st.integers(-1, 3), min_size=1, max_size=9)


@settings(max_examples=60)
@given(LABELS, st.lists(st.booleans(), min_size=4, max_size=4))
def test_it_is_exact_at_one_and_at_all_and_near_between(labels: list[int], correct: list[bool]) -> None:
    votes = Votes(np.array(labels), np.array(correct))
    n = len(labels)
    ks = list(range(1, n + 1))
    found = consensus(votes, ks, problem=0)
    expected = [by_enumeration(labels, correct, k) for k in ks]
    assert found[0] == pytest.approx(expected[0], abs=1e-12)
    assert found[-1] == pytest.approx(expected[-1], abs=1e-12)
    assert found == pytest.approx(expected, abs=0.25)  # 64 shuffles: a standard error of at most 0.063


def test_many_samples_come_near_the_expectation() -> None:
    labels = [0] * 5 + [1] * 4 + [2] * 3 + [-1] * 2
    found = [consensus(Votes(np.array(labels), np.array([True, False, False])), [3, 8], problem) for problem in range(60)]
    expected = [by_enumeration(labels, [True, False, False], k) for k in (3, 8)]
    assert np.mean(found, axis=0) == pytest.approx(expected, abs=0.015)


def test_a_majority_wins_a_tie_is_shared_and_silence_is_not_correct() -> None:
    def at_all(labels: list[int], correct: list[bool]) -> float:
        return consensus(Votes(np.array(labels), np.array(correct, dtype=bool)), [len(labels)], 0)[0]

    assert at_all([0, 1, 1], [True, False]) == 0
    assert at_all([0, 0, 1, -1, -1, -1], [True, False]) == 1  # who has no answer has no vote
    assert at_all([0, 0, 1, 1], [True, False]) == 0.5
    assert at_all([0, 1, 2], [True, False, False]) == pytest.approx(1 / 3)
    assert at_all([-1, -1], []) == 0


def test_it_is_the_same_each_time() -> None:
    votes = Votes(np.array([0, 1, 1, 2, 0, -1, 2, 2]), np.array([True, False, False]))
    assert consensus(votes, [1, 2, 4, 8], 5) == consensus(votes, [1, 2, 4, 8], 5)


def test_answers_are_grouped_by_value_and_every_correct_one_is_one_answer() -> None:
    verdicts = [right("1/2"), wrong("0.25"), right(r"\frac12"), wrong(r"\frac{1}{4}"), wrong(None), LOST, wrong("7"), wrong(" ")]
    votes = count_votes([verdicts], never_same)
    assert votes is not None
    assert votes[0].labels.tolist() == [0, 1, 0, 1, -1, -1, 2, -1]
    assert votes[0].correct.tolist() == [True, False, False]


def test_without_mathematics_answers_agree_as_texts() -> None:
    votes = count_votes([[right("+ -"), right(" + -"), right("- +"), wrong("0.5"), wrong("1/2")]], None)
    assert votes is not None
    assert votes[0].labels.tolist() == [0, 0, 1, 2, 3] and votes[0].correct.tolist() == [True, True, False, False]


def test_a_grader_that_names_no_answers_cannot_be_voted_on() -> None:
    assert count_votes([[right("1"), wrong(None)], [right(None)]], None) is None


def test_wrong_expressions_are_merged_by_math_verify() -> None:
    problems = [
        [wrong("x+1"), wrong("y"), wrong("1+x"), wrong(r"\sqrt{12}"), wrong(r"2\sqrt{3}"), wrong("x+1"), wrong(r"\sqrt{12}")],
        [wrong("2"), wrong("5"), right("3")],
        [wrong(r"\pi r")] * 2 + [wrong(r"r\pi")],
    ]
    with GraderPool("math_verify", workers=1, timeout_s=20, memory_limit_mib=512, cache_size=100) as pool:
        votes = count_votes(problems, same_by_math_verify(pool))
    assert votes is not None
    assert [item.labels.tolist() for item in votes] == [[0, 1, 0, 2, 2, 0, 2], [0, 1, 2], [0, 0, 0]]


def test_only_the_most_frequent_wrong_answers_are_compared_and_numbers_never() -> None:
    asked: list[tuple[str, str]] = []

    def same(pairs: Sequence[tuple[str, str]]) -> list[bool]:
        asked.extend(pairs)
        return [False] * len(pairs)

    texts = [f"x_{{{index}}}" for index in range(COMPARED + 5)]
    count_votes([[wrong(text) for text in texts for _ in range(30 - texts.index(text))], [wrong(str(number)) for number in range(9)]], same)
    assert len(asked) == COMPARED * (COMPARED - 1) // 2
    assert {text for pair in asked for text in pair} == set(texts[:COMPARED])
    asked.clear()
    count_votes([[wrong(text) for text in ("x", "x", "y", "z")]], same)
    assert asked == [("y", "x"), ("z", "x")]  # not those that were given once
