"""Grades samples that anyone generated, one JSON object a line, and summarises them as Pass@k and cons@k.

May import: types, rewards, observability and this package's estimators. Needs neither a model nor a GPU.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_nsr.evaluation.results import benchmark_result, render_result
from megatron_nsr.evaluation.votes import count_votes, same_by_math_verify
from megatron_nsr.observability.run_directory import replacing, write_json
from megatron_nsr.rewards.pool import GraderPool
from megatron_nsr.types import Prompt, Reason, UserError, Verdict

_LINES_AT_ONCE = 8192  # responses in memory at a time


@dataclass(frozen=True, slots=True)
class ScoreSummary:
    """What `score` found. result: see evaluation/results.py; a sample without a verdict counts as not correct."""

    result: dict[str, Any]
    outcomes: dict[str, int]  # Outcome value: samples
    reasons: dict[str, int]  # Reason value: samples


@dataclass(frozen=True, slots=True)
class _Sample:
    question_id: Any  # as it stood in the file
    response: str
    prompt: Prompt
    line: int


def score_file(
    path: Path,
    out: Path,
    *,
    grader: str,
    workers: int,
    timeout_s: float,
    memory_limit_mib: int,
    cache_size: int,
    allow_uneven: bool = False,
) -> ScoreSummary:
    """Grades the samples of `path` and writes a verdict a line to `out`, in their order; `out` appears only when it is complete.

    A line has `question_id` (text or whole number), `response`, and `answer` or `label`; its other fields reach the grader as
    `Prompt.extra`, and `level`, `type` and `subject` of a question's first line group the scores. A line of `out` has `question_id`,
    `outcome`, `reason` and `answer` (what was extracted, or null). Reward settings: see GraderPool.

    Raises UserError naming file and line before anything is graded, also where questions have unequally many samples (a file that was
    cut short, say) and allow_uneven is not set; and where the grader cannot be loaded.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    check_output("out", out, path)
    _check_counts(path, allow_uneven)
    prompts: dict[str, Prompt] = {}
    verdicts: dict[str, list[Verdict]] = {}
    with (
        GraderPool(grader, workers=workers, timeout_s=timeout_s, memory_limit_mib=memory_limit_mib, cache_size=cache_size) as pool,
        replacing(out) as unfinished,
    ):
        with unfinished.open("w", encoding="utf-8") as file:
            for sample, verdict in _graded(path, pool):
                _write(file, sample, verdict)
                prompts.setdefault(sample.prompt.id, sample.prompt)
                verdicts.setdefault(sample.prompt.id, []).append(verdict)
        votes = count_votes(list(verdicts.values()), same_by_math_verify(pool) if grader == "math_verify" else None)
    every = [verdict for samples in verdicts.values() for verdict in samples]
    return ScoreSummary(
        result=benchmark_result(list(prompts.values()), list(verdicts.values()), votes),
        outcomes=dict(Counter(verdict.outcome.value for verdict in every).most_common()),
        reasons=dict(Counter(verdict.reason.value for verdict in every).most_common()),
    )


def write_summary(path: Path, summary: ScoreSummary, *, source: Path, benchmark: str) -> None:
    """Writes the scores in the form of a run's eval/step_N.json, which `compare` reads; `model` is the file of samples."""
    write_json(path, {"model": str(source), "step": 0, "benchmarks": {benchmark: summary.result}, "heldout_entropy": None})


def render(summary: ScoreSummary, name: str) -> RenderableType:
    """Tables for a terminal: Pass@k and cons@k, and how the verdicts came about; a line about timeouts, which depend on the machine."""
    samples = sum(summary.outcomes.values())
    verdicts = Table()
    for column in ("", "samples", "share"):
        verdicts.add_column(column, justify="right" if column else "left")
    for counts in (summary.outcomes, summary.reasons):
        for label, count in counts.items():
            verdicts.add_row(label, str(count), f"{100 * count / samples:.2f} %")
        verdicts.add_section()
    parts: list[RenderableType] = [render_result(name, summary.result), Text(f"Verdicts on {samples} samples"), verdicts]
    if timeouts := summary.reasons.get(Reason.TIMEOUT.value):
        advice = "if the machine was busy, score again or raise --timeout-s"
        parts.append(Text(f"timeouts: {timeouts}, each of them counted as not correct; {advice}"))
    return Group(*parts)


def check_output(field: str, out: Path, *taken: Path) -> None:
    """Raises UserError unless `out`, the value of `field`, can be written and is none of the other files."""
    if not out.parent.is_dir():
        raise UserError(f"{field}={out}: no directory {out.parent}")
    if out.is_dir():
        raise UserError(f"{field}={out}: is a directory; name a file")
    for other in taken:
        if out.resolve() == other.resolve():
            raise UserError(f"{field}={out}: is {other} itself; name another file")


def _check_counts(path: Path, allow_uneven: bool) -> None:
    """Reads every line once, and holds the questions to one number of samples."""
    counts: Counter[str] = Counter()
    last: dict[str, int] = {}
    for sample in _read(path):
        counts[sample.prompt.id] += 1
        last[sample.prompt.id] = sample.line
    if not counts:
        raise UserError(f"{path}: no samples; write one JSON object a line")
    usual = Counter(counts.values()).most_common(1)[0][0]
    other = next((question for question, count in counts.items() if count != usual), None)
    if other is not None and not allow_uneven:
        raise UserError(
            f"{path}:{last[other]}: question {other!r} ends here with {counts[other]} samples, where most questions have {usual}; complete "
            f"the file, or allow it with --allow-uneven, which scores k up to the fewest, {min(counts.values())}"
        )


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


# --- reading ------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> Iterator[_Sample]:
    """The file's samples; blank lines are skipped."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _sample(line, f"{path}:{number}", number)


def _sample(line: bytes, where: str, number: int) -> _Sample:
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
    return _Sample(question, response, prompt, number)


def _field(record: dict[str, Any], where: str, name: str, numbers: tuple[type, ...]) -> Any:
    """A field's value, which is text or one of the kinds of number named."""
    if name not in record:
        raise UserError(f"{where}: no `{name}`")
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, (str, *numbers)):
        wanted = "text or a number" if numbers else "text"
        raise UserError(f"{where}: `{name}` is {json.dumps(value)[:60]}, not {wanted}")
    return value
