"""The example reward: right at once is correct, right after a false start is not, and everything else is as the quickstart has it."""

from __future__ import annotations

import pytest

from examples.own_reward import FirstAttempt
from examples.quickstart.grader import PuzzleGrader
from megatron_nsr.types import Outcome, Prompt, Reason

PROMPT = Prompt("p", "3?7?2=20", (1,), "+*", extra={"numbers": [3, 7, 2], "target": 20})
FALSE_START = r"try 3*7=21-2=19 no try 3+7=10*2=20 \boxed{+*}"


@pytest.mark.parametrize(
    ("response", "outcome"),
    [(r"try 3+7=10*2=20 \boxed{+*}", Outcome.CORRECT), (FALSE_START, Outcome.WRONG), (r"no try \boxed{--}", Outcome.WRONG)],
)
def test_only_the_first_attempt_counts(response: str, outcome: Outcome) -> None:
    assert FirstAttempt().grade(response, PROMPT).outcome is outcome


def test_it_differs_from_the_quickstart_s_in_nothing_else() -> None:
    assert PuzzleGrader().grade(FALSE_START, PROMPT).outcome is Outcome.CORRECT
    assert FirstAttempt().grade(FALSE_START, PROMPT).reason is Reason.MISMATCH
    for response in ("no box", r"\boxed{+}", r"\boxed{**}"):
        assert FirstAttempt().grade(response, PROMPT) == PuzzleGrader().grade(response, PROMPT)
    unusable = Prompt("p", "?", (1,), "+*")
    assert FirstAttempt().grade(r"\boxed{+*}", unusable).outcome is Outcome.NONE
