"""A grader for tests that does what the problem's row says. May import: megatron_nsr.types."""

from __future__ import annotations

import time

from megatron_nsr.types import Outcome, Prompt, Reason, Verdict


class Scripted:
    """The row's `verdict` is "correct", "wrong", "raises", or "never", which takes longer than any deadline of a test."""

    def grade(self, response: str, prompt: Prompt) -> Verdict:
        verdict = prompt.extra["verdict"]
        if verdict == "never":
            time.sleep(60)
        if verdict == "raises":
            raise ValueError("no licence")
        if verdict == "wrong":
            return Verdict(Outcome.WRONG, Reason.MISMATCH)
        return Verdict(Outcome.CORRECT, Reason.MATCH)
