"""What an evaluation says of a benchmark: Pass@k and cons@k with intervals, over all problems and by level and subject.

May import: types, rewards, numpy and this package.

A benchmark's entry in eval/step_N.json (`benchmarks.NAME`), and what `score --summary` writes:

    n               samples a problem; the fewest, where problems differ
    SCORES          over all problems, see below
    groups          {"level": {"Level 1": {"problems": 437, SCORES}, ...}, "type": {...}}: for each of the columns `level`, `type` and
                    `subject` that the problems have, its values in order; absent where they have none of them
    no_verdict      samples without a verdict, which count as not correct
    truncated       samples that ran out of tokens
    problems        [{"id": ..., "correct": 3, "n": 16, "level": ..., "type": ...}, ...], one entry a problem, in the file's order

SCORES is these keys, each {"1": 0.5, "2": ..., ...} with k = 1, 2, 4, ... up to n:

    pass_at_k, ci_low, ci_high              unbiased Pass@k and its 95 % bootstrap interval over problems
    cons_at_k, cons_ci_low, cons_ci_high    majority vote (evaluation/votes.py) likewise; absent where the grader names no answers

A single problem has no intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_nsr.evaluation.bootstrap import MIN_PROBLEMS, interval
from megatron_nsr.evaluation.evaluation_files import CONS_KEYS, NO_VALUE, PASS_KEYS
from megatron_nsr.evaluation.pass_at_k import default_ks, pass_at_k
from megatron_nsr.evaluation.votes import Votes, consensus
from megatron_nsr.types import Outcome, Prompt, Reason, Verdict

GROUP_COLUMNS = ("level", "type", "subject")


def benchmark_result(prompts: Sequence[Prompt], verdicts: Sequence[Sequence[Verdict]], votes: Sequence[Votes] | None) -> dict[str, Any]:
    """The entry described above. verdicts: those of each prompt's samples; votes: from `count_votes` on them.

    A sample without a verdict counts as not correct. Raises ValueError where there is no problem, or one has no sample.
    """
    correct = [sum(verdict.outcome is Outcome.CORRECT for verdict in samples) for samples in verdicts]
    total = [len(samples) for samples in verdicts]
    if not total or not min(total):
        raise ValueError("benchmark_result needs at least one problem, and a sample of each")
    ks = default_ks(min(total))
    passed = np.array([[pass_at_k(c, n, k) for k in ks] for c, n in zip(correct, total, strict=True)])
    agreed = None if votes is None else np.array([consensus(item, ks, problem) for problem, item in enumerate(votes)])
    every = [verdict for samples in verdicts for verdict in samples]
    marks = [_marks(prompt) for prompt in prompts]
    groups = _groups(marks, ks, passed, agreed)
    return {
        "n": min(total),
        **_scores(ks, passed, agreed),
        **({"groups": groups} if groups else {}),
        "no_verdict": sum(verdict.outcome is Outcome.NONE for verdict in every),
        "truncated": sum(verdict.reason is Reason.TRUNCATED for verdict in every),
        "problems": [
            {"id": prompt.id, "correct": c, "n": n, **mark} for prompt, c, n, mark in zip(prompts, correct, total, marks, strict=True)
        ],
    }


def render_result(name: str, result: Mapping[str, Any]) -> RenderableType:
    """Tables for a terminal: the curves with their intervals, then a row for each level and subject."""
    counts = sorted({problem["n"] for problem in result["problems"]})
    each = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    heading = f"{name}: {len(result['problems'])} problems, {each} samples each"
    if result["no_verdict"]:
        heading += f"; {result['no_verdict']} samples have no verdict and count as not correct"
    parts: list[RenderableType] = [Text(heading), _curve_table(result)]  # no title: that wraps at the table's width
    for column, groups in result.get("groups", {}).items():
        table = Table(column, *(f"Pass@{k}" for k in result["pass_at_k"]), "problems")
        for value, scores in groups.items():
            table.add_row(value, *(_percent(share) for share in scores["pass_at_k"].values()), str(scores["problems"]))
        parts.append(table)
    return Group(*parts)


def _curve_table(result: Mapping[str, Any]) -> Table:
    curves = [("Pass@k", PASS_KEYS)] + ([("cons@k", CONS_KEYS)] if "cons_at_k" in result else [])
    table = Table()
    for column in ("k", *(column for title, _ in curves for column in (title, "95 % interval"))):
        table.add_column(column, justify="right")
    for k in result["pass_at_k"]:
        cells = []
        for _, (value, low, high) in curves:
            band = f"{_percent(result[low][k])} to {_percent(result[high][k])}" if low in result else NO_VALUE
            cells += [_percent(result[value][k]), band]
        table.add_row(k, *cells)
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _marks(prompt: Prompt) -> dict[str, str]:
    """The prompt's level and subject, as far as it has them."""
    values = ((column, prompt.extra.get(column)) for column in GROUP_COLUMNS)
    return {column: str(value) for column, value in values if isinstance(value, str | int)}


def _groups(marks: Sequence[Mapping[str, str]], ks: Sequence[int], passed: np.ndarray, agreed: np.ndarray | None) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    for column in GROUP_COLUMNS:
        for value in sorted({mark[column] for mark in marks if column in mark}):
            rows = [index for index, mark in enumerate(marks) if mark.get(column) == value]
            scores = _scores(ks, passed[rows], None if agreed is None else agreed[rows])
            groups.setdefault(column, {})[value] = {"problems": len(rows), **scores}
    return groups


def _scores(ks: Sequence[int], passed: np.ndarray, agreed: np.ndarray | None) -> dict[str, dict[str, float]]:
    """passed, agreed: float64 [problems, ks]."""
    scores: dict[str, dict[str, float]] = {}
    for keys, shares in ((PASS_KEYS, passed), (CONS_KEYS, agreed)):
        if shares is None:
            continue
        rows = [shares.mean(axis=0), *(interval(shares) if len(shares) >= MIN_PROBLEMS else ())]
        scores |= {key: dict(zip(map(str, ks), row.tolist(), strict=True)) for key, row in zip(keys, rows, strict=False)}
    return scores
