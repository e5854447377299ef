"""cons@k: how often the answer that most of k responses give is correct.

May import: types, rewards, numpy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from megatron_nsr.rewards.pool import GraderPool
from megatron_nsr.types import Outcome, Prompt, Verdict

SHUFFLES = 64  # of a problem's responses, each cut into n // k blocks of k
COMPARED = 8  # distinct wrong answers of a problem that are compared with one another, the most frequent ones
SEED = 20250601

SameAnswers = Callable[[Sequence[tuple[str, str]]], Sequence[bool]]  # for (answer, other answer): whether they are equivalent
_CORRECT = ("correct",)  # the class of every correct answer, where equivalence is known


@dataclass(frozen=True, slots=True)
class Votes:
    """The answers of a problem's responses. labels: int64 [samples], -1 where a response has no answer; correct: bool [answers]."""

    labels: np.ndarray
    correct: np.ndarray


@dataclass(frozen=True, slots=True)
class _Wrong:
    """A problem's wrong answer: its key, as it was first given, and how often."""

    key: Hashable
    text: str
    count: int

    @property
    def is_number(self) -> bool:
        """Numbers that differ as such need no comparison."""
        return isinstance(self.key, Fraction)


def same_by_math_verify(pool: GraderPool) -> SameAnswers:
    """Equivalence as the math grader sees it, under the pool's deadline; what cannot be parsed equals nothing."""

    def same(pairs: Sequence[tuple[str, str]]) -> list[bool]:
        items = [(rf"\boxed{{{answer}}}", Prompt(id="", text="", token_ids=(), answer=other)) for answer, other in pairs]
        return [verdict.outcome is Outcome.CORRECT for verdict in pool.grade(items)]

    return same


def count_votes(verdicts: Sequence[Sequence[Verdict]], same: SameAnswers | None) -> list[Votes] | None:
    """Which responses of a problem agree; verdicts: those of each problem's samples.

    A response without an answer (no box or an empty one, out of tokens, grader lost) does not vote. With `same`, answers are
    mathematics: all correct ones are one answer, and wrong ones are where they are the same number, the same text, or `same` says so.
    It is asked for the COMPARED most frequent wrong answers of a problem, and not for two that were given once: parsing is slow.
    Without it, answers agree as texts. None where a correct verdict names no answer: such a grader cannot be voted on.
    """
    if any(verdict.outcome is Outcome.CORRECT and not verdict.answer for samples in verdicts for verdict in samples):
        return None
    keys = [[_key(verdict, mathematical=same is not None) for verdict in samples] for samples in verdicts]
    if same is not None:
        merged = _merge([_frequent_wrong(*problem) for problem in zip(keys, verdicts, strict=True)], same)
        keys = [[names.get(key, key) for key in samples] for samples, names in zip(keys, merged, strict=True)]
    return [_votes(samples, of) for samples, of in zip(keys, verdicts, strict=True)]


def consensus(votes: Votes, ks: Sequence[int], problem: int) -> list[float]:
    """cons@k for each k: the expected share of correct majority answers among k of the responses, drawn without replacement.

    Of answers with equally many votes one is drawn at random: k responses count the correct share of their leading answers. Where
    nobody votes, nothing is correct. The mean over the n // k blocks of each of SHUFFLES shuffles, seeded by `problem`: exact at
    k = 1, where it is Pass@1, and at k = n. Majority voting: arXiv 2203.11171.
    """
    shuffled = np.random.default_rng([SEED, problem]).permuted(np.tile(votes.labels, (SHUFFLES, 1)), axis=1)
    samples = len(votes.labels)
    return [_majority(shuffled[:, : samples - samples % k].reshape(-1, k), votes.correct) for k in ks]


def _majority(blocks: np.ndarray, correct: np.ndarray) -> float:
    """The mean over blocks (int64 [blocks, k]) of the correct share of the answers with the most votes."""
    rows, labels = np.repeat(np.arange(len(blocks)), blocks.shape[1]), blocks.ravel()
    voted = labels >= 0
    if not voted.any():
        return 0.0
    cells, counts = np.unique(rows[voted] * len(correct) + labels[voted], return_counts=True)
    row, label = np.divmod(cells, len(correct))
    most = np.zeros(len(blocks), counts.dtype)
    np.maximum.at(most, row, counts)
    leads = counts == most[row]
    leaders = np.bincount(row[leads], minlength=len(blocks))
    right = np.bincount(row[leads & correct[label]], minlength=len(blocks))
    return float(np.mean(right / np.maximum(leaders, 1)))


def _key(verdict: Verdict, *, mathematical: bool) -> Hashable:
    """What is equal for answers that need no comparison to be the same; None for no answer."""
    if not verdict.answer or not verdict.answer.strip():
        return None
    correct = verdict.outcome is Outcome.CORRECT
    if not mathematical:
        return verdict.answer.strip(), correct
    if correct:
        return _CORRECT
    from megatron_nsr.rewards.math_grader import value_or_text  # brings sympy

    return value_or_text(verdict.answer)


def _frequent_wrong(keys: Sequence[Hashable], verdicts: Sequence[Verdict]) -> list[_Wrong]:
    """The most frequent wrong answers."""
    texts: dict[Hashable, str] = {}
    for key, verdict in zip(keys, verdicts, strict=True):
        if verdict.answer and key not in (None, _CORRECT):
            texts.setdefault(key, verdict.answer)
    return [_Wrong(key, texts[key], count) for key, count in Counter(key for key in keys if key in texts).most_common(COMPARED)]


def _merge(wrong: Sequence[list[_Wrong]], same: SameAnswers) -> list[dict[Hashable, Hashable]]:
    """For each problem: a wrong answer's key to that of the more frequent answer that it equals. All problems share each round."""
    pending = [list(answers) for answers in wrong]
    merged: list[dict[Hashable, Hashable]] = [{} for _ in wrong]
    while any(len(answers) > 1 for answers in pending):
        pairs = []
        for problem, answers in enumerate(pending):
            if answers:
                first = answers.pop(0)
                pairs += [(problem, other, first) for other in answers if first.count > 1 and not (other.is_number and first.is_number)]
        equal = same([(other.text, first.text) for _, other, first in pairs])
        for (problem, other, first), yes in zip(pairs, equal, strict=True):
            if yes:
                merged[problem][other.key] = first.key
                pending[problem].remove(other)
    return merged


def _votes(keys: Sequence[Hashable], verdicts: Sequence[Verdict]) -> Votes:
    labels: dict[Hashable, int] = {}
    correct: list[bool] = []
    for key, verdict in zip(keys, verdicts, strict=True):
        if key is not None and key not in labels:
            labels[key] = len(labels)
            correct.append(verdict.outcome is Outcome.CORRECT)
    return Votes(np.array([-1 if key is None else labels[key] for key in keys]), np.array(correct, dtype=bool))
