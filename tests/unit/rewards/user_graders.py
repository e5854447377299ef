"""Graders that a user might write, well and badly; loaded by import path in the tests of the pool."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path

from megatron_nsr.types import Outcome, Prompt, Reason, Verdict


class Obedient:
    """Does what the response says."""

    def grade(self, response: str, prompt: Prompt) -> Verdict:
        word, _, rest = response.partition(" ")
        return getattr(self, word)(rest, prompt)

    def correct(self, rest: str, prompt: Prompt) -> Verdict:
        return Verdict(Outcome.CORRECT, Reason.MATCH, rest or None)

    def source(self, rest: str, prompt: Prompt) -> Verdict:
        return Verdict(Outcome.WRONG, Reason.MISMATCH, f"{prompt.source} {prompt.extra['level']}")

    def text(self, rest: str, prompt: Prompt) -> Verdict:
        return Verdict(Outcome.CORRECT, Reason.MATCH, prompt.text)

    def pid(self, rest: str, prompt: Prompt) -> Verdict:
        return Verdict(Outcome.CORRECT, Reason.MATCH, str(os.getpid()))

    def torch_loaded(self, rest: str, prompt: Prompt) -> Verdict:
        return Verdict(Outcome.CORRECT, Reason.MATCH, str("torch" in sys.modules))

    def note(self, rest: str, prompt: Prompt) -> Verdict:
        with Path(rest).open("a") as file:
            file.write(f"{os.getpid()}\n")
        return Verdict(Outcome.CORRECT, Reason.MATCH)

    def sleep(self, rest: str, prompt: Prompt) -> Verdict:
        time.sleep(float(rest))
        return Verdict(Outcome.CORRECT, Reason.MATCH)

    def spin(self, rest: str, prompt: Prompt) -> Verdict:
        self.note(rest, prompt)
        while True:
            pass

    def compute(self, rest: str, prompt: Prompt) -> Verdict:
        return Verdict(Outcome.WRONG, Reason.MISMATCH, str(9 ** (9**9) % 7))  # holds the interpreter lock for ever

    def fill(self, rest: str, prompt: Prompt) -> Verdict:
        return Verdict(Outcome.WRONG, Reason.MISMATCH, str(len(bytearray(int(rest) * 2**20))))

    def segfault(self, rest: str, prompt: Prompt) -> Verdict:
        return Verdict(Outcome.WRONG, Reason.MISMATCH, str(ctypes.string_at(0)))

    def print(self, rest: str, prompt: Prompt) -> Verdict:
        print("a user's print")
        return Verdict(Outcome.CORRECT, Reason.MATCH)

    def bool(self, rest: str, prompt: Prompt) -> bool:
        return True


class Unbuildable:
    def __init__(self) -> None:
        raise ValueError("no licence file")


class Ungrading:
    pass
