"""Grades a boxed mathematical answer against the reference with math-verify; exact comparison first, where it decides.

May import: types, math-verify and this package's extraction. It keeps no deadline of its own: the pool does.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

from megatron_nsr.rewards.extraction import last_boxed
from megatron_nsr.types import Outcome, Prompt, Reason, Verdict

# math-verify 0.9.0 warns once a process that its SIGALRM time-outs are off. They raise in threads; the pool's deadline replaces them.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_BOX_ONLY = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
# No answer is longer or more deeply nested, unless the reference is; the parser's time grows exponentially with the nesting.
_MAX_CHARACTERS = 2000
_MAX_NESTING = 16

_CORRECT, _WRONG, _NONE = Outcome.CORRECT, Outcome.WRONG, Outcome.NONE


class MathGrader:
    r"""The reward of MATH-style problems: the response's last box against `Prompt.answer` (with or without its own `\boxed`).

    Correct where the texts agree after light normalisation, where both are numbers and equal, or where math-verify 0.9.0 says so.
    Stricter than math-verify in four cases: every numeric side of an equation must equal the reference (`7=8` is not 8, `x=8` is);
    names and words are compared as text (`ABC` is not `CBA`); numerals in different bases differ (`12_3`, `12_5`);
    and only the last box counts.
    """

    def __init__(self) -> None:
        _parse(r"\frac{1}{2}+x")  # builds the parser's tables before the first deadline runs

    def grade(self, response: str, prompt: Prompt) -> Verdict:
        """Never raises on bad text; may run for ever on hostile expressions, so call it under a deadline."""
        boxed_gold = last_boxed(prompt.answer)
        gold = (prompt.answer if boxed_gold is None else boxed_gold).strip()
        if not normalize(gold):
            return Verdict(_NONE, Reason.BAD_GOLD)
        answer = last_boxed(response)
        if answer is None:
            return Verdict(_WRONG, Reason.NO_BOX)
        outcome, reason = compare(answer, gold)
        return Verdict(outcome, reason, answer)


def compare(answer: str, gold: str) -> tuple[Outcome, Reason]:
    """Compares two answers given without their boxes: the cheapest test that decides."""
    plain_answer, plain_gold = normalize(answer), normalize(gold)
    if plain_answer == plain_gold:
        return _CORRECT, Reason.MATCH
    if not plain_answer or _is_oversized(plain_answer, plain_gold):
        return _WRONG, Reason.UNPARSABLE
    decided = _compare_numbers(plain_answer, plain_gold)
    if decided is None:
        decided = _compare_words(plain_answer, plain_gold)
    if decided is None:
        return compare_expressions(answer, gold)
    return (_CORRECT, Reason.MATCH) if decided else (_WRONG, Reason.MISMATCH)


# --- text ---------------------------------------------------------------------------------------------------------------

_THOUSANDS = re.compile(r"(?<=[0-9])(?:,\\!|\{,\})(?=[0-9]{3})")
_BLANK = re.compile(r"(?<!\\)\\ |~")  # not the end of a matrix row, `\\ `
_NOISE = re.compile(r"\\(?:left|right)(?![a-zA-Z])|(?<!\\)\\[!,;:]|\\?\$|(?<![0-9])\s+|\s+(?![0-9])")  # `1 1/2` keeps its blank
_FRACTION_STYLE = re.compile(r"\\[dtc]frac(?![a-zA-Z])")


def normalize(text: str) -> str:
    r"""Removes what never changes an answer: blanks, spacing, dollar signs, \left and \right, fraction styles, a final full stop."""
    text = _NOISE.sub("", _BLANK.sub(" ", _THOUSANDS.sub("", text)))
    return _FRACTION_STYLE.sub(r"\\frac", text).rstrip(".")


def _is_oversized(answer: str, gold: str) -> bool:
    return len(answer) > max(_MAX_CHARACTERS, len(gold)) or _nesting(answer) > max(_MAX_NESTING, _nesting(gold))


def _nesting(text: str) -> int:
    """How deep its brackets go, where each that opens counts until one closes."""
    deepest = depth = 0
    for character in text:
        if character in "({[":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")}]":
            depth -= 1
    return deepest


# --- numbers ------------------------------------------------------------------------------------------------------------

_NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?:"
    r"(?P<whole>[0-9]{1,60})"
    r"|(?P<decimal>[0-9]{0,60}\.[0-9]{1,60})"
    r"|\\frac\{(?P<num>-?[0-9]{1,60})\}\{(?P<den>[0-9]{1,60})\}"
    r"|\\frac(?P<num1>[0-9])(?P<den1>[0-9])"
    r"|(?P<num2>[0-9]{1,60})/(?P<den2>[0-9]{1,60})"
    r")"
)
_ROUNDING = Fraction(1, 10**5)  # math-verify compares decimals rounded to 6 places: further apart than this, they never agree


def _number(text: str) -> tuple[Fraction, bool] | None:
    """The value of a plain integer, decimal or fraction and whether it is exact (no decimal); None for anything else."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign = -1 if match["sign"] == "-" else 1
    if match["decimal"]:
        return sign * Fraction(match["decimal"]), False
    if match["whole"]:
        return Fraction(sign * int(match["whole"])), True
    denominator = int(match["den"] or match["den1"] or match["den2"])
    return (sign * Fraction(int(match["num"] or match["num1"] or match["num2"]), denominator), True) if denominator else None


def value_or_text(answer: str) -> Fraction | str:
    """Equal for answers that are the same plain number, or the same text after light normalisation."""
    plain = normalize(answer)
    number = _number(plain)
    return plain if number is None else number[0]


def _compare_numbers(answer: str, gold: str) -> bool | None:
    """Decides where both are plain numbers; None where rounding would decide, or either is something else."""
    left, right = _number(answer), _number(gold)
    if left is None or right is None:
        return None
    if left[0] == right[0]:
        return True
    both_exact = left[1] and right[1]
    return False if both_exact or abs(left[0] - right[0]) > _ROUNDING else None


# --- words --------------------------------------------------------------------------------------------------------------

_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\{([^{}\\]*)\}")
_LETTERS = re.compile(r"[A-Za-z]{2,}")


def _compare_words(answer: str, gold: str) -> bool | None:
    r"""Decides where the gold is a name or a word (`ABC`, `\text{east}`) and the answer is letters too; None elsewhere.

    math-verify reads letters as a commutative product. A gold in plain lower case (`xy`) is left to it, as a product of variables.
    """
    letters_gold, letters_answer = (_TEXT_COMMAND.sub(r"\1", text) for text in (gold, answer))
    if not (_LETTERS.fullmatch(letters_gold) and _LETTERS.fullmatch(letters_answer)):
        return None
    if letters_gold == gold and gold.islower():
        return None
    return letters_gold.lower() == letters_answer.lower()


# --- expressions --------------------------------------------------------------------------------------------------------

# Powers of powers, factorials of factorials and huge exponents of numbers: sympy would evaluate them until it is killed.
_EXPLOSIVE = re.compile(r"\^\{?\(?-?[0-9]+\)?(?:!|\^)|\^\{?\(?-?[0-9]{6,}|\^\{?\(+-?[0-9.]+[!^]|!\)*!|[0-9]{5,}\)*!|\)!\)*!")
_BASE = re.compile(r"[0-9A-Fa-f]+_\{?([0-9]+)\}?")
_EQUALS = re.compile(r"(?<![\\<>!:])=")
_COMMAND = re.compile(r"\\[a-zA-Z]+")


def compare_expressions(answer: str, gold: str) -> tuple[Outcome, Reason]:
    """The slow path: both are parsed to sympy expressions."""
    plain_answer, plain_gold = normalize(answer), normalize(gold)
    parsed_gold = [] if _EXPLOSIVE.search(plain_gold) else _parse(gold)
    if not _has_expression(parsed_gold):
        return _NONE, Reason.BAD_GOLD
    if _EXPLOSIVE.search(plain_answer):
        return _NONE, Reason.TIMEOUT  # known beforehand; a killed worker would cost the deadline and a new process
    parsed_answer = _parse(answer)
    if not _has_expression(parsed_answer):
        return _WRONG, Reason.UNPARSABLE
    bases = _BASE.fullmatch(plain_answer), _BASE.fullmatch(plain_gold)
    if bases[0] and bases[1] and bases[0][1] != bases[1][1]:  # math-verify drops the subscript
        return _WRONG, Reason.MISMATCH
    if _EQUALS.search(plain_answer) and not _EQUALS.search(plain_gold):
        equal = _equation_agrees(answer, parsed_gold)
    else:
        equal = _verify(parsed_gold, parsed_answer)
    return (_CORRECT, Reason.MATCH) if equal else (_WRONG, Reason.MISMATCH)


def _equation_agrees(answer: str, parsed_gold: list[Any]) -> bool:
    """An equation answers a question for a value if each side without variables equals it; without such a side the last one counts."""
    sides = _EQUALS.split(answer)
    numeric = [side for side in sides if side.strip() and not re.search("[A-Za-z]", _COMMAND.sub("", side))]
    return all(_verify(parsed_gold, _parse(side)) for side in numeric or sides[-1:])


def _has_expression(parsed: list[Any]) -> bool:
    return any(not isinstance(item, str) for item in parsed)


@lru_cache(maxsize=4096)
def _parse(text: str) -> list[Any]:
    """math-verify's reading of an answer, boxed again so that it looks nowhere else: an expression where it parses, then its text."""
    text = _THOUSANDS.sub("", text.strip().rstrip("."))
    return parse(rf"\boxed{{{text}}}", _BOX_ONLY, parsing_timeout=None)


def _verify(gold: list[Any], answer: list[Any]) -> bool:
    return bool(verify(gold, answer, timeout_seconds=None))
