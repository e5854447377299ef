from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from megatron_nsr.rewards.extraction import last_boxed
from megatron_nsr.rewards.math_grader import MathGrader, compare, compare_expressions
from megatron_nsr.types import Outcome, Prompt, Reason, Verdict

GRADER = MathGrader()


def grade(response: str, gold: str) -> Verdict:
    return GRADER.grade(response, Prompt("p", "", (), gold))


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("7", "7"),
        ("7.", "7"),
        ("07", "7"),
        ("0.5", r"\frac{1}{2}"),
        (r"\dfrac{2}{4}", r"\frac12"),
        ("-1/2", r"-\frac{1}{2}"),
        (r"\frac{-1}{2}", r"-\frac{1}{2}"),
        ("0.333333", r"\frac{1}{3}"),
        (r"10,\!000", "10000"),
        ("10,000", "10{,}000"),
        (r"\$5", "5"),
        (r"5\text{ cm}", "5"),
        (r"2\sqrt{2}", r"\sqrt{8}"),
        ("(x+1)^2", "x^2+2x+1"),
        ("2, 1", "1,2"),
        (r"\left(3, \frac{\pi}{2}\right)", r"(3,\frac{\pi}{2})"),
        ("x=8", "8"),
        ("8=x", "8"),
        ("2+6=8", "8"),
        ("8", "x=8"),
        ("Even", r"\text{even}"),
        (r"\textbf{(C)}", "C"),
        ("yx", "xy"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        ("8", r"so \boxed{8}"),
    ],
)
def test_equal_answers_are_correct(answer: str, gold: str) -> None:
    verdict = grade(rf"\boxed{{{answer}}}", gold)
    assert (verdict.outcome, verdict.reason, verdict.answer) == (Outcome.CORRECT, Reason.MATCH, answer)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("8", "7"),
        ("0.34", r"\frac{1}{3}"),
        ("7=8", "8"),
        ("x=7=8", "8"),
        ("x=7", "8"),
        ("ABC", "CBA"),
        (r"\text{neve}", r"\text{even}"),
        ("12_5", "12_3"),
        ("1,3", "1,2"),
        ("1 1/2", r"\frac{11}{2}"),
        ("x+2", "x+1"),
        (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ],
)
def test_other_answers_are_wrong(answer: str, gold: str) -> None:
    verdict = grade(rf"\boxed{{{answer}}}", gold)
    assert (verdict.outcome, verdict.reason, verdict.answer) == (Outcome.WRONG, Reason.MISMATCH, answer)


def test_only_the_last_box_counts() -> None:
    assert grade(r"\boxed{7} or \boxed{8}", "7").outcome is Outcome.WRONG
    assert grade(r"\boxed{7} or \boxed{8}", "8").outcome is Outcome.CORRECT


@pytest.mark.parametrize("response", ["the answer is 7", r"\boxed{7", ""])
def test_no_box_is_wrong(response: str) -> None:
    assert grade(response, "7") == Verdict(Outcome.WRONG, Reason.NO_BOX)


@pytest.mark.parametrize("answer", ["x+", "???", "", r"\frac{}{", "{" * 50 + "}" * 50, "9" * 5000, "(" * 500])
def test_a_box_that_is_no_expression_is_unparsable(answer: str) -> None:
    if answer.count("{") == answer.count("}"):
        assert grade(rf"\boxed{{{answer}}}", "7").reason is Reason.UNPARSABLE
    assert compare(answer, "7") == (Outcome.WRONG, Reason.UNPARSABLE)


@pytest.mark.parametrize("gold", ["", "  ", r"\boxed{}", "$"])
def test_an_empty_reference_is_no_verdict(gold: str) -> None:
    assert grade(r"\boxed{7}", gold).reason is Reason.BAD_GOLD


def test_an_unparsable_reference_still_matches_its_own_text() -> None:
    assert grade(r"\boxed{a +}", "a+").outcome is Outcome.CORRECT
    assert grade(r"\boxed{7}", "a+") == Verdict(Outcome.NONE, Reason.BAD_GOLD, "7")


@pytest.mark.parametrize("answer", ["9^{9^9}", "((9!)!)!", "2^{9999999}", "99999!", "x+9^{9!}"])
def test_expressions_that_would_never_end_give_no_verdict(answer: str) -> None:
    assert grade(rf"\boxed{{{answer}}}", "7").reason is Reason.TIMEOUT


@pytest.mark.parametrize("answer", ["2^{10}", "x^2y^3", "10^6", r"e^{x^2}", "5!", "3^{2007}"])
def test_ordinary_powers_are_graded(answer: str) -> None:
    assert compare(answer, "7") == (Outcome.WRONG, Reason.MISMATCH)


def test_maths_own_solutions_are_correct(benchmark_data: Path) -> None:
    rows = pq.read_table(benchmark_data / "math" / "test.parquet").to_pylist()
    solutions = [row["reward_model"]["ground_truth"]["solution"] for row in rows]
    assert sum(grade(solution, solution).outcome is Outcome.CORRECT for solution in solutions) >= 0.999 * len(rows)


def test_the_parser_alone_agrees_with_maths_own_answers(benchmark_data: Path) -> None:
    """The slow path on each answer against itself: a change in math-verify that the comparison of texts would hide."""
    rows = pq.read_table(benchmark_data / "math" / "test.parquet").to_pylist()[:300]
    answers = [last_boxed(row["reward_model"]["ground_truth"]["solution"]) or "" for row in rows]
    assert [answer for answer in answers if compare_expressions(answer, answer)[1] is not Reason.MATCH] == []
