"""A reward of one's own: the puzzle's answer counts only if the first attempt found it.

    megatron-nsr train configs/quickstart.yaml reward.grader=examples.own_reward:FirstAttempt run.dir=runs/first_attempt

The base's author tries, says ` no ` and tries again. Whoever wants a model that does not guess says so in the reward. The config names
the class; it is made without arguments in every grader process, which is killed when it passes `reward.timeout_s`.
"""

from __future__ import annotations

from examples.quickstart.corpus import RETRY
from examples.quickstart.grader import PuzzleGrader
from megatron_nsr.types import Outcome, Prompt, Reason, Verdict


class FirstAttempt:
    """As the quickstart's grader, but a right answer after a false start is wrong."""

    def __init__(self) -> None:
        self.answer = PuzzleGrader()

    def grade(self, response: str, prompt: Prompt) -> Verdict:
        """`prompt` has the reference answer, and in `extra` the data's other columns."""
        verdict = self.answer.grade(response, prompt)
        if verdict.outcome is Outcome.CORRECT and RETRY in response:
            return Verdict(Outcome.WRONG, Reason.MISMATCH, verdict.answer)
        return verdict
