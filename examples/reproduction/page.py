"""docs/reproduction.md: every sentence about an outcome is computed from the results file. May import: the comparison and its parts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from examples.reproduction import search
from examples.reproduction.comparison import BASE, Comparison, Field, pass_1
from examples.reproduction.figures import LONG_KS
from examples.reproduction.intervals import RESAMPLES, Interval
from examples.reproduction.orderings import NAMES, Evidence, Ordering, orderings
from examples.reproduction.plan import LONG_METHODS, METHODS
from examples.reproduction.results import KS, Results, full_curve

WANTED_PASS_256 = 0.90, 0.97
ONE, FULL = "One base: `make reproduce`", "The full comparison: `make reproduce-full`"
INTRODUCTION = """# The paper's comparison on two CPU cores

    make reproduce         # one base model, three seeds, fixed settings
    make reproduce-full    # three bases, five seeds, and a search for each method's learning rate

repeat the comparison of arXiv 2506.01347 with a tiny model. A base model is pre-trained on operator puzzles
([quickstart](quickstart.md) explains the task), each method trains it further through the ordinary `megatron-nsr train`, and Pass@k is
estimated on test problems that no training has seen. Two runs go side by side. Both commands skip what is done, so that the same command
continues after a kill; then they write this page, with the time that was measured. Which ordering holds is decided by rules from the
numbers in `docs/results/`; nothing below about their outcome was written by hand.

A model of 200,000 parameters on a puzzle says nothing about language models of billions. It says whether this code's objectives
behave as the paper describes where the whole experiment can be repeated by anyone.
"""

CHOICE = """## The setting was not picked blind

Short pilot runs came first: on puzzles of five numbers, with a base model of 600 supervised steps and the mean over sequences
(`objective.aggregation=sequence_mean`). In them NSR's share of correct training responses fell from .17 to .03 by step 19, with 78 % of the
responses cut off at the token limit. Only then were the token mean of the paper's public code and a stronger base chosen. So the setting is
one in which NSR was expected to train, and the results say nothing about others. The margin of one point in the rules below was set before
any of these results was there.
"""

READING = f"""## How to read it

- Differences are paired: the same base, the same test problems. Intervals are at 95 %. Those of Pass@k come from {RESAMPLES} resamples of
  bases, runs and problems; those of entropy are Student's t over the means of the bases or, with one base, over its
  runs. With one base they say nothing about other bases.
- *Equal steps* compares methods after the same number of training steps. *Matched Pass@1* compares each where it first reaches the
  highest Pass@1 that all of them reach (interpolated between evaluations), so that a method that merely learns more slowly does not look
  more diverse. That level is chosen on the test samples that are then compared, so the luck of these samples is in it and the
  intervals do not show it.
- *undecided* means that the intervals are too wide for the rule, not that the claim is wrong.
"""


def render(one: Results | None, full: Results | None, settings: Sequence[dict[str, Any]]) -> str:
    """The page; a comparison that was not run is said to be missing. settings: the candidate puzzles with what their bases reached."""
    parts = [INTRODUCTION, CHOICE, READING]
    for title, results, prefix in ((ONE, one, "reproduction"), (FULL, full, "reproduction_full")):
        parts.append(_section(title, results, prefix) if results else f"## {title}\n\n**Not run yet**: there are no numbers of it.\n")
    if settings:
        parts.append(_candidates(settings))
    return "\n".join(parts)


def _section(title: str, results: Results, prefix: str) -> str:
    comparison = Comparison(results)
    found = orderings(comparison)
    equal, matched = comparison.at_equal_steps(), comparison.at_matched_pass_1()
    blocks = [
        f"## {title}",
        _setting(results),
        "### The paper's orderings",
        _verdicts(found),
        f"### After {results.steps} steps",
        _pass_at_k_table(equal, [BASE, *comparison.methods]),
        f"![Pass@k of base and methods, and the difference to the base](images/{prefix}_pass_at_k.png)",
        "Difference to the base, points:",
        _difference_table(equal, comparison.methods),
        "### At matched Pass@1",
        _matched_text(comparison),
        *([_pass_at_k_table(matched, comparison.methods)] if comparison.matched_levels() else []),
        "### Extended training",
        _long_table(comparison),
        f"![Pass@k against training steps](images/{prefix}_long.png)",
        "### What decided each verdict",
        *(_evidence(each) for each in found),
        "### Learning rates",
        _rates(results),
    ]
    return "\n\n".join(blocks) + "\n"


def _setting(results: Results) -> str:
    settings, cost = results.settings, results.cost
    curve = full_curve(results.bases[0].evaluation)
    largest = max(curve)
    base_ranges = [full_curve(each.evaluation)[largest] for each in results.bases]
    counts = f"{_count(len(results.bases), 'base')}, {_count(len(settings['seeds']), 'seed')} a method and base"
    reach = ", ".join(_percent(value) for value in base_ranges)
    hours = f"{cost['wall_s'] / 60:.0f} minutes by the clock and {cost['cpu_s'] / 60:.0f} minutes of CPU time"
    environment = results.environment
    commit = (environment.get("git") or {}).get("commit", "unknown")
    return (
        f"{settings['numbers']} numbers (1 to {settings['largest_operand']}, values up to {settings['largest_value']}, operators drawn "
        f"from `{settings['operators']}`), "
        f"{settings['base_steps']:,} supervised steps; {counts}; {settings['test']} test problems, n = {settings['samples']} "
        f"(base: {results.bases[0].evaluation.n}). Pass@{largest} of the base: {reach}. {_missing(results)}"
        f"It took {hours} ({cost['cpu_s'] / 120:.0f} minutes of two cores with no other work), "
        f"on {environment['hardware']['cores']} cores ({environment['hardware']['cpu']}), at commit {commit[:12]}."
    )


def _missing(results: Results) -> str:
    missing = [NAMES[method] for method in METHODS if method not in results.methods]
    return f"Not in this comparison: {', '.join(missing)}. " if missing else ""


def _verdicts(found: Iterable[Ordering]) -> str:
    rows = [(each.label, each.claim, f"**{each.verdict}**") for each in found]
    return _table(("", "claim", "at this scale"), rows)


def _pass_at_k_table(field: Field, names: Sequence[str]) -> str:
    rows = []
    for name in names:
        entropy = field.entropy_level(name)
        rows.append((NAMES[name], *(_share(each) for each in field.level(name)), _nats(entropy)))
    return _table(("", *(f"Pass@{k}, %" for k in KS), "entropy, nats"), rows)


def _difference_table(field: Field, methods: Sequence[str]) -> str:
    rows = [(NAMES[method], *(_points(each) for each in field.difference(method, BASE))) for method in methods]
    return _table(("", *(f"Pass@{k}" for k in KS)), rows)


def _matched_text(comparison: Comparison) -> str:
    levels, pairs = comparison.matched_levels(), len(comparison.pairs)
    used = f"{len(levels)} of {_count(pairs, 'pair')} of base and seed are used here"
    if len(levels) < pairs:
        used += "; in the others some method's Pass@1 never exceeded the base's"
    if not levels:
        return f"{used}. So nothing is left to compare, and what is asked at matched Pass@1 stays undecided."
    bases = [pass_1(comparison.results.base(comparison.pairs[position][0])) for position in levels]
    return f"{used}. Common Pass@1: {_range(list(levels.values()))}; the bases': {_range(bases)}."


def _long_table(comparison: Comparison) -> str:
    rows = []
    for method in (name for name in LONG_METHODS if name in comparison.methods):
        for step in comparison.long_steps(method):
            field = comparison.at_step(step, [method])
            levels = field.level(method)
            rows.append((NAMES[method], str(step), *(_share(levels[KS.index(k)]) for k in LONG_KS), _nats(field.entropy_level(method))))
    return _table(("", "step", *(f"Pass@{k}, %" for k in LONG_KS), "entropy, nats"), rows)


def _evidence(ordering: Ordering) -> str:
    rows = [(each.what, _interval(each)) for each in ordering.evidence if not math.isnan(each.interval.mean)]
    unit = "points" if ordering.evidence[0].unit == "points" else "nats"
    shown = _table(("difference", unit), rows) if rows else "There is no run to compare."
    return f"**{ordering.label}** {ordering.claim}: **{ordering.verdict}**. It {ordering.rule}.\n\n{shown}"


def _rates(results: Results) -> str:
    used = {method: sorted({run.learning_rate for run in results.of(method)}) for method in results.methods}
    text = "Used: " + ", ".join(f"{NAMES[method]} {', '.join(f'{rate:g}' for rate in rates)}" for method, rates in used.items()) + "."
    if not results.search:
        return f"{text} No search was made in this comparison: the rates are fixed in `examples/reproduction/scales.py`."
    seeds = sorted({run.seed for run in results.search})
    runs = f"{_count(len({run.base for run in results.search}), 'base')}, seeds {', '.join(map(str, seeds))}"
    scores = search.scores(results.search)
    rates = sorted({rate for row in scores.values() for rate in row})
    rows = [(NAMES[method], *(_percent(row[rate]) if rate in row else "" for rate in rates)) for method, row in scores.items()]
    table = _table(("mean Pass@1..64", *(f"{rate:g}" for rate in rates)), rows)
    where = f"on {results.settings['validation']} validation problems after {results.steps} steps ({runs})"
    return f"{text} Chosen by the mean over k {where}:\n\n{table}"


def _candidates(settings: Sequence[dict[str, Any]]) -> str:
    ks = sorted({int(k) for each in settings for k in each["pass_at_k"]})
    shown = [k for k in ks if k in (1, 8, 64, 256)]
    rows = []
    for each in settings:
        author = f"{each['right']:g}, {each['box_wrong']:g}, {each['slip']:g}"
        reached = (*(_percent(each["pass_at_k"][str(k)]) for k in shown), f"{each['entropy']:.3f}")
        rows.append((f"{each['numbers']}", f"`{each['operators']}`", author, f"{each['base_steps']:,}", *reached))
    author = "author: right attempt, wrong one boxed, slip"
    table = _table(("numbers", "operators drawn from", author, "supervised steps", *(f"Pass@{k}" for k in shown), "entropy, nats"), rows)
    low, high = WANTED_PASS_256
    inside = sum(low <= each["pass_at_k"]["256"] <= high for each in settings)
    return (
        f"## The choice of the puzzle\n\nBase models of candidate puzzles on validation problems. Wanted: a Pass@256 of {100 * low:.0f} to "
        f"{100 * high:.0f} %, so that guessing does not decide the right end of the curve; {inside} of {len(settings)} have it."
        f"\n\n{table}\n"
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _share(each: Interval) -> str:
    return f"{100 * each.mean:.1f} ({100 * each.low:.1f} to {100 * each.high:.1f})"


def _points(each: Interval) -> str:
    return f"{100 * each.mean:+.1f} ({100 * each.low:+.1f} to {100 * each.high:+.1f})"


def _nats(each: Interval) -> str:
    return f"{each.mean:.3f}" + ("" if math.isnan(each.low) else f" ({each.low:.3f} to {each.high:.3f})")


def _interval(evidence: Evidence) -> str:
    each = evidence.interval
    if evidence.unit == "points":
        return _points(each)
    return f"{each.mean:+.3f}" + (" (one run: no interval)" if math.isnan(each.low) else f" ({each.low:+.3f} to {each.high:+.3f})")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _range(shares: Sequence[float]) -> str:
    low, high = _percent(min(shares)), _percent(max(shares))
    return low if low == high else f"{low} to {high}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
