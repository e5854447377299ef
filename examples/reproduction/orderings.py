"""Which of the paper's orderings (arXiv 2506.01347, sections 4 and 5) hold, decided by rules from intervals. May import: the comparison.

A verdict is one of three, and its rule stands beside it. Single intervals are at 95 %; nothing is corrected for their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from examples.reproduction.comparison import BASE, Comparison, Field
from examples.reproduction.intervals import Interval
from examples.reproduction.results import KS

Verdict = Literal["holds", "does not hold", "undecided"]
MARGIN = 0.01  # how far below a mean may lie and still count as "not below", share of problems
LARGEST_K = KS[-1]
NAMES = {BASE: "base", "psr": "PSR", "nsr": "NSR", "w_reinforce": "W-REINFORCE", "reinforce": "REINFORCE", "grpo": "GRPO", "ppo": "PPO"}


@dataclass(frozen=True, slots=True)
class Evidence:
    """One difference: what it is, and its interval. unit: `points` of Pass@k or `nats`."""

    what: str
    interval: Interval
    unit: Literal["points", "nats"] = "points"


@dataclass(frozen=True, slots=True)
class Ordering:
    """One claim with its verdict. rule: what decides it, in words."""

    label: str
    claim: str
    verdict: Verdict
    rule: str
    evidence: tuple[Evidence, ...]


def orderings(comparison: Comparison) -> list[Ordering]:
    """Claims (a) to (e), and those that can be asked at matched Pass@1 a second time."""
    equal, matched = comparison.at_equal_steps(), comparison.at_matched_pass_1()
    return [
        nsr_not_below_base(equal),
        psr_trades(equal),
        w_reinforce_between("(c)", "W-REINFORCE is between PSR and NSR or above both, at every k", equal),
        entropy_order("(d)", "entropy: NSR above GRPO above PSR", equal),
        long_training(comparison),
        psr_lowest(matched),
        w_reinforce_between("(c), matched", "at equal Pass@1, W-REINFORCE is between PSR and NSR or above both, at every k", matched),
        entropy_order("(d), matched", "at equal Pass@1, entropy: NSR above GRPO above PSR", matched),
    ]


def nsr_not_below_base(field: Field) -> Ordering:
    intervals = field.difference("nsr", BASE)
    rule = f"holds if at every k the interval of NSR - base lies above -{_points(MARGIN)}; does not hold if at some k it lies below 0"
    return Ordering("(a)", "NSR is not below the base at any k", not_below(intervals), rule, _by_k("NSR - base", intervals))


def psr_trades(field: Field) -> Ordering:
    """Highest Pass@1 and lowest Pass@64."""
    first, last = _against_all(field, "psr", KS[0]), _against_all(field, "psr", LARGEST_K)
    verdict = strictly_above([each.interval for each in first] + [_negated(each.interval) for each in last])
    rule = "holds if every interval lies on the claimed side of 0; does not hold if one lies on the other side"
    return Ordering("(b)", f"PSR has the highest Pass@1 and the lowest Pass@{LARGEST_K}", verdict, rule, (*first, *last))


def psr_lowest(field: Field) -> Ordering:
    evidence = _against_all(field, "psr", LARGEST_K)
    verdict = strictly_above([_negated(each.interval) for each in evidence])
    rule = "holds if every interval lies below 0; does not hold if one lies above"
    return Ordering("(b), matched", f"at equal Pass@1, PSR has the lowest Pass@{LARGEST_K}", verdict, rule, evidence)


def w_reinforce_between(label: str, claim: str, field: Field) -> Ordering:
    psr, nsr = field.difference("w_reinforce", "psr"), field.difference("w_reinforce", "nsr")
    if any(a.below and b.below for a, b in zip(psr, nsr, strict=True)):
        verdict: Verdict = "does not hold"
    else:
        reaches_one = all(max(a.low, b.low) > -MARGIN for a, b in zip(psr, nsr, strict=True))
        verdict = "holds" if reaches_one else "undecided"
    rule = (
        f"holds if at every k the interval of W-REINFORCE - PSR or that of W-REINFORCE - NSR lies above -{_points(MARGIN)}; "
        "does not hold if at some k both lie below 0"
    )
    return Ordering(label, claim, verdict, rule, (*_by_k("W-REINFORCE - PSR", psr), *_by_k("W-REINFORCE - NSR", nsr)))


def entropy_order(label: str, claim: str, field: Field) -> Ordering:
    pairs = (("nsr", "grpo"), ("grpo", "psr"))
    evidence = tuple(Evidence(f"{NAMES[a]} - {NAMES[b]}", field.entropy_difference(a, b), "nats") for a, b in pairs)
    rule = "holds if both intervals lie above 0; does not hold if one lies below"
    return Ordering(label, claim, strictly_above([each.interval for each in evidence]), rule, evidence)


def long_training(comparison: Comparison) -> Ordering:
    """NSR loses with more steps and W-REINFORCE does not."""
    nsr, weighted = comparison.long_change("nsr"), comparison.long_change("w_reinforce")
    steps, last = comparison.results.steps, comparison.long_steps("nsr")[-1]
    if any(each.below for each in nsr) and not_below(weighted) == "holds":
        verdict: Verdict = "holds"
    elif not_below(nsr) == "holds" or not_below(weighted) == "does not hold":
        verdict = "does not hold"
    else:
        verdict = "undecided"
    rule = (
        f"looks at Pass@k at step {last} - at step {steps}; holds if NSR's interval lies below 0 at some k and W-REINFORCE's above "
        f"-{_points(MARGIN)} at every k; does not hold if NSR's lies above -{_points(MARGIN)} at every k or W-REINFORCE's below 0 at some k"
    )
    claim = "long NSR training degrades, long W-REINFORCE training does not"
    evidence = (*_by_k("NSR, late - early", nsr), *_by_k("W-REINFORCE, late - early", weighted))
    return Ordering("(e)", claim, verdict, rule, evidence)


def not_below(intervals: Sequence[Interval]) -> Verdict:
    """Whether every mean is at least 0, up to MARGIN."""
    if any(each.below for each in intervals):
        return "does not hold"
    return "holds" if all(each.low > -MARGIN for each in intervals) else "undecided"


def strictly_above(intervals: Iterable[Interval]) -> Verdict:
    """Whether every mean is above 0."""
    intervals = list(intervals)
    if any(each.below for each in intervals):
        return "does not hold"
    return "holds" if all(each.above for each in intervals) else "undecided"


def _against_all(field: Field, method: str, k: int) -> tuple[Evidence, ...]:
    column = KS.index(k)
    others = [name for name in field.tables if name != method]
    return tuple(Evidence(f"Pass@{k}, {NAMES[method]} - {NAMES[other]}", field.difference(method, other)[column]) for other in others)


def _by_k(what: str, intervals: Sequence[Interval]) -> tuple[Evidence, ...]:
    return tuple(Evidence(f"Pass@{k}, {what}", interval) for k, interval in zip(KS, intervals, strict=True))


def _negated(interval: Interval) -> Interval:
    return Interval(-interval.mean, -interval.high, -interval.low)


def _points(share: float) -> str:
    return f"{100 * share:g} point"
