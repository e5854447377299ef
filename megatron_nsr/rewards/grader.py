"""The interface of a reward: what grades one response.

May import: types.
"""

from __future__ import annotations

from typing import Protocol

from megatron_nsr.types import Prompt, Verdict


class Grader(Protocol):
    """Judges responses. A user's own reward is such a class: no base class, constructed without arguments in each grader process."""

    def grade(self, response: str, prompt: Prompt) -> Verdict:
        """The verdict on `response`. An exception counts as Outcome.NONE, Reason.CRASH; so does any other type of return value.

        response: the decoded response, without the stop id. prompt: the problem with its reference answer, and `extra` from the data.
        """
        ...
