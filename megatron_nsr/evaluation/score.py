"""Grades samples that anyone generated, one JSON object a line, and summarises them as Pass@k.

May import: types, rewards and this package's estimator. Needs neither a model nor a GPU.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_nsr.evaluation.pass_at_k import default_ks, pass_at_k_curve
from megatron_nsr.rewards.pool import GraderPool
from megatron_nsr.types import Outcome, Prompt, UserError, Verdict

_LINES_AT_ONCE = 8192  # what is in memory at a time


@dataclass(frozen=True, slots=True)
class ScoreSummary:
    """What `score` found. Ratios are over all samples; a sample without a verdict counts as not correct."""

    samples: int
    questions: int
    samples_per_question: tuple[int, int]  # fewest, most
    pass_at_k: dict[int, float]  # k: mean over questions, k up to the fewest samples of a question
    outcomes: dict[str, int]  # Outcome value: samples
    reasons: dict[str, int]  # Reason value: samples


@dataclass(frozen=True, slots=True)
class _Sample:
    question_id: Any  # as it stood in the file
    response: str
    prompt: Prompt


def score_file(
    path: Path, out: Path, *, grader: str, workers: int, timeout_s: float, memory_limit_mib: int, cache_size: int
) -> ScoreSummary:
    """Grades the samples of `path` and writes a verdict a line to `out`, in their order; `out` appears only when it is complete.

    A line has `question_id` (text or whole number), `response`, and `answer` or `label`; its other fields reach the grader as
    `Prompt.extra`. A line of `out` has `question_id`, `outcome`, `reason` and `answer` (what was extracted, or null). Reward settings:
    see GraderPool. Raises UserError naming file and line before anything is graded, and where the grader cannot be loaded.
    """
    _check_paths(path, out)
    if not sum(1 for _ in _read(path)):
        raise UserError(f"{path}: no samples; write one JSON object a line")
    counts: dict[str, list[int]] = {}  # question: correct, total
    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.unfinished")
    try:
        with (
            GraderPool(grader, workers=workers, timeout_s=timeout_s, memory_limit_mib=memory_limit_mib, cache_size=cache_size) as pool,
            unfinished.open("w", encoding="utf-8") as file,
        ):
            for sample, verdict in _graded(path, pool):
                _write(file, sample, verdict)
                count = counts.setdefault(sample.prompt.id, [0, 0])
                count[0] += verdict.outcome is Outcome.CORRECT
                count[1] += 1
                outcomes[verdict.outcome.value] += 1
                reasons[verdict.reason.value] += 1
        unfinished.replace(out)
    finally:
        unfinished.unlink(missing_ok=True)
    return _summarise(counts, outcomes, reasons)


def render(summary: ScoreSummary) -> RenderableType:
    """Two tables for a terminal: Pass@k, and how the verdicts came about."""
    fewest, most = summary.samples_per_question
    each = str(fewest) if fewest == most else f"{fewest} to {most}"
    curve = Table()
    curve.add_column("k", justify="right")
    curve.add_column("Pass@k", justify="right")
    for k, value in summary.pass_at_k.items():
        curve.add_row(str(k), f"{100 * value:.2f} %")
    verdicts = Table()
    for name in ("", "samples", "share"):
        verdicts.add_column(name, justify="right" if name else "left")
    for counts in (summary.outcomes, summary.reasons):
        for name, count in counts.items():
            verdicts.add_row(name, str(count), f"{100 * count / summary.samples:.2f} %")
        verdicts.add_section()
    heading = f"Pass@k over {summary.questions} questions, {each} samples each"  # not a title: that wraps at the table's width
    return Group(Text(heading), curve, Text(f"Verdicts on {summary.samples} samples"), verdicts)


def _check_paths(path: Path, out: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if not out.parent.is_dir():
        raise UserError(f"out={out}: no directory {out.parent}")
    if out.is_dir():
        raise UserError(f"out={out}: is a directory; name a file")
    if out.exists() and out.samefile(path):
        raise UserError(f"out={out}: is the file of samples itself; name another one")


def _graded(path: Path, pool: GraderPool) -> Iterator[tuple[_Sample, Verdict]]:
    samples = _read(path)
    while chunk := list(islice(samples, _LINES_AT_ONCE)):
        yield from zip(chunk, pool.grade([(sample.response, sample.prompt) for sample in chunk]), strict=True)


def _write(file: TextIO, sample: _Sample, verdict: Verdict) -> None:
    record = {
        "question_id": sample.question_id,
        "outcome": verdict.outcome.value,
        "reason": verdict.reason.value,
        "answer": verdict.answer,
    }
    file.write(json.dumps(record) + "\n")


def _summarise(counts: dict[str, list[int]], outcomes: Counter[str], reasons: Counter[str]) -> ScoreSummary:
    correct = [count[0] for count in counts.values()]
    total = [count[1] for count in counts.values()]
    return ScoreSummary(
        samples=sum(total),
        questions=len(counts),
        samples_per_question=(min(total), max(total)),
        pass_at_k=pass_at_k_curve(correct, total, default_ks(min(total))),
        outcomes=dict(outcomes.most_common()),
        reasons=dict(reasons.most_common()),
    )


# --- reading ------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> Iterator[_Sample]:
    """The file's samples; blank lines are skipped."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _sample(line, f"{path}:{number}")


def _sample(line: bytes, where: str) -> _Sample:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: a JSON {type(record).__name__}, not an object")
    question = _field(record, where, "question_id", numbers=(int,))
    response = _field(record, where, "response", numbers=())
    name = "label" if "answer" not in record and "label" in record else "answer"
    if name not in record:
        raise UserError(f"{where}: no `answer` or `label`")
    answer = _field(record, where, name, numbers=(int, float))
    extra = {key: value for key, value in record.items() if key not in ("question_id", "response", name)}
    prompt = Prompt(id=str(question), text="", token_ids=(), answer=str(answer), extra=extra)
    return _Sample(question, response, prompt)


def _field(record: dict[str, Any], where: str, name: str, numbers: tuple[type, ...]) -> Any:
    """A field's value, which is text or one of the kinds of number named."""
    if name not in record:
        raise UserError(f"{where}: no `{name}`")
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, (str, *numbers)):
        wanted = "text or a number" if numbers else "text"
        raise UserError(f"{where}: `{name}` is {json.dumps(value)[:60]}, not {wanted}")
    return value
