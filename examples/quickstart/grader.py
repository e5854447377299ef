r"""The quickstart's reward, written as a user writes one: a class with `grade`, named in the config by its import path.

May import: megatron_nsr.types and the puzzle.
"""

from __future__ import annotations

import re

from examples.quickstart.puzzle import Problem, solves
from megatron_nsr.types import Outcome, Prompt, Reason, Verdict

# An answer is operators only, so a box never holds braces.
BOX = re.compile(r"\\boxed\{([^{}]*)\}")


class PuzzleGrader:
    """Exact: the last box is correct if its operators reach the target, whether or not they are the reference answer."""

    def grade(self, response: str, prompt: Prompt) -> Verdict:
        """Reads `numbers` and `target` from the prompt's extra fields; without them there is no verdict."""
        try:
            problem = Problem(tuple(map(int, prompt.extra["numbers"])), int(prompt.extra["target"]))
        except (KeyError, TypeError, ValueError):
            return Verdict(Outcome.NONE, Reason.BAD_GOLD)
        boxes = BOX.findall(response)
        if not boxes:
            return Verdict(Outcome.WRONG, Reason.NO_BOX)
        answer = boxes[-1].strip()
        try:
            correct = solves(problem, answer)
        except ValueError:
            return Verdict(Outcome.WRONG, Reason.UNPARSABLE, answer)
        return Verdict(Outcome.CORRECT, Reason.MATCH, answer) if correct else Verdict(Outcome.WRONG, Reason.MISMATCH, answer)
