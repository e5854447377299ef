"""The quickstart's grader: exact, and loaded from the config as a user's own would be."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.quickstart.grader import PuzzleGrader
from examples.quickstart.puzzle import operator_strings
from megatron_nsr.platform.imports import load_object
from megatron_nsr.types import Outcome, Prompt, Reason, Verdict


def puzzle(numbers: Any = (3, 7, 2), target: Any = 20, answer: str = "+*") -> Prompt:
    return Prompt(id="p", text="3?7?2=20", token_ids=(), answer=answer, extra={"numbers": numbers, "target": target})


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        (r"try 3+7=10*2=20 \boxed{+*}", Verdict(Outcome.CORRECT, Reason.MATCH, "+*")),
        (r"\boxed{ +* } done", Verdict(Outcome.CORRECT, Reason.MATCH, "+*")),
        (r"\boxed{--} no \boxed{+*}", Verdict(Outcome.CORRECT, Reason.MATCH, "+*")),
        (r"\boxed{+*} no \boxed{--}", Verdict(Outcome.WRONG, Reason.MISMATCH, "--")),
        (r"try 3+7=10*2=20 \boxed{++}", Verdict(Outcome.WRONG, Reason.MISMATCH, "++")),
        ("try 3+7=10*2=20 +*", Verdict(Outcome.WRONG, Reason.NO_BOX)),
        (r"\boxed{+*", Verdict(Outcome.WRONG, Reason.NO_BOX)),
        ("", Verdict(Outcome.WRONG, Reason.NO_BOX)),
        (r"\boxed{+}", Verdict(Outcome.WRONG, Reason.UNPARSABLE, "+")),
        (r"\boxed{}", Verdict(Outcome.WRONG, Reason.UNPARSABLE, "")),
        (r"\boxed{20}", Verdict(Outcome.WRONG, Reason.UNPARSABLE, "20")),
        (r"\boxed{+/}", Verdict(Outcome.WRONG, Reason.UNPARSABLE, "+/")),
    ],
)
def test_the_last_box_decides(response: str, verdict: Verdict) -> None:
    assert PuzzleGrader().grade(response, puzzle()) == verdict


def test_any_operators_that_reach_the_target_are_correct() -> None:
    prompt = puzzle((4, 2, 2), 4, answer="+-")
    right = [o for o in operator_strings(2) if PuzzleGrader().grade(rf"\boxed{{{o}}}", prompt).reward == 1.0]
    assert right == ["+-", "-+", "-*"]


@given(st.text())
def test_no_response_breaks_it(response: str) -> None:
    assert PuzzleGrader().grade(response, puzzle()).outcome in (Outcome.WRONG, Outcome.CORRECT)


@pytest.mark.parametrize("extra", [{}, {"numbers": [3, 7, 2]}, {"numbers": None, "target": 20}, {"numbers": ["x"], "target": 20}])
def test_a_prompt_without_a_puzzle_gives_no_verdict(extra: dict[str, Any]) -> None:
    prompt = Prompt(id="p", text="", token_ids=(), answer="+*", extra=extra)
    verdict = PuzzleGrader().grade(r"\boxed{+*}", prompt)
    assert (verdict.outcome, verdict.reason) == (Outcome.NONE, Reason.BAD_GOLD)


def test_it_loads_by_the_import_path_of_the_config() -> None:
    grader = load_object("examples.quickstart.grader:PuzzleGrader", "reward.grader")()
    assert grader.grade(r"\boxed{+*}", puzzle()).reward == 1.0
