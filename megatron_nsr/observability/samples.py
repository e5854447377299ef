"""RUN/samples/step_N.parquet: the step's trajectories with their verdicts, to be read by people.

May import: types and libraries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_nsr.observability.run_directory import replacing
from megatron_nsr.types import Prompt, Trajectory, UserError, Verdict


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One response. length: response tokens; mean_logprob: the engine's, nats a token; None for an empty response."""

    step: int
    prompt_id: str
    prompt: str
    response: str
    outcome: str
    reason: str
    answer: str  # the reference
    extracted: str | None  # what the grader read from the response
    length: int
    finish_reason: str
    weight_version: int
    mean_logprob: float | None


SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("outcome", pa.string()),
        ("reason", pa.string()),
        ("answer", pa.string()),
        ("extracted", pa.string()),
        ("length", pa.int64()),
        ("finish_reason", pa.string()),
        ("weight_version", pa.int64()),
        ("mean_logprob", pa.float64()),
    ]
)


def sample_rows(step: int, prompts: Sequence[Prompt], trajectories: Sequence[Trajectory], verdicts: Sequence[Verdict]) -> list[SampleRow]:
    """Rows of a step: trajectory i has verdict i, and `trajectory.prompt` indexes `prompts`."""
    return [
        SampleRow(
            step=step,
            prompt_id=prompts[trajectory.prompt].id,
            prompt=prompts[trajectory.prompt].text,
            response=trajectory.text,
            outcome=verdict.outcome.value,
            reason=verdict.reason.value,
            answer=prompts[trajectory.prompt].answer,
            extracted=verdict.answer,
            length=trajectory.length,
            finish_reason=trajectory.finish_reason,
            weight_version=trajectory.weight_version,
            mean_logprob=float(np.mean(trajectory.rollout_logprobs)) if trajectory.length else None,
        )
        for trajectory, verdict in zip(trajectories, verdicts, strict=True)
    ]


def write_samples(path: Path, rows: Sequence[SampleRow]) -> None:
    """Writes the rows as one parquet file, atomically."""
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA), temporary)


def read_samples(path: Path) -> list[SampleRow]:
    """Reads what `write_samples` wrote; raises UserError where the file is no such table."""
    try:
        table = pq.read_table(path, columns=[field.name for field in fields(SampleRow)])
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a file of samples ({str(error).splitlines()[0]})") from None
    return [SampleRow(**record) for record in table.to_pylist()]
