"""Generations of an evaluation, kept in parts as parquet, so that one that was interrupted goes on where it stopped.

May import: config, types, data, observability and pyarrow.

RUN/eval/step_N/BENCHMARK/ holds _settings.json, what the generations depend on, and part_00000.parquet, part_00001.parquet, ... Each
part holds all samples of consecutive problems and is written whole or not at all; SCHEMA names its columns. Readers of parquet take the
directory for one table: they pass over names that begin with an underscore.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_nsr.config import Config
from megatron_nsr.data.prompts import PromptSet
from megatron_nsr.observability.run_directory import replacing, write_json
from megatron_nsr.types import Outcome, Prompt, Reason, Trajectory, UserError, Verdict

SCHEMA = pa.schema(
    [
        ("problem", pa.int64()),  # position among the benchmark's problems, from 0
        ("problem_id", pa.string()),
        ("sample", pa.int64()),  # from 0
        ("response", pa.string()),
        ("tokens", pa.list_(pa.int32())),  # the response's ids, the stop id included
        ("finish_reason", pa.string()),  # stop or length
        ("outcome", pa.string()),
        ("reason", pa.string()),
        ("answer", pa.string()),  # what the grader read from the response
        ("reference", pa.string()),
        ("weight_version", pa.int64()),  # the step of the weights; _settings.json has their checksum
    ]
)
_VERDICT_COLUMNS = ["problem", "outcome", "reason", "answer"]


def generation_settings(config: Config, name: str, problems: PromptSet, stop_ids: tuple[int, ...]) -> dict[str, Any]:
    """What a benchmark's generations and verdicts depend on beside the weights, by config field."""
    evaluation = config.evaluation
    digest = hashlib.blake2b(digest_size=8)
    for prompt in problems.prompts:
        digest.update(repr((prompt.id, prompt.token_ids, prompt.answer)).encode())
    return {
        f"evaluation.benchmarks.{name}": f"{len(problems.prompts)} problems, digest {digest.hexdigest()}",
        "evaluation.samples": evaluation.samples,
        "evaluation.temperature": evaluation.temperature,
        "evaluation.top_p": evaluation.top_p,
        "evaluation.top_k": evaluation.top_k,
        "evaluation.max_response_tokens": evaluation.max_response_tokens or config.rollout.max_response_tokens,
        "eos_token_id": list(stop_ids),
        "run.seed": config.run.seed,
        "model.dtype": config.model.dtype,
        **({"rollout.quantization": config.rollout.quantization} if config.rollout.quantization else {}),
        "reward.grader": config.reward.grader,
        "reward.truncated": config.reward.truncated,
    }


def weights_digest(checksums: Mapping[str, int]) -> str:
    """A name for weights, from the checksum of each tensor (weights.checksums): the same at any layout."""
    return hashlib.blake2b(repr(sorted(checksums.items())).encode(), digest_size=8).hexdigest()


def check_settings(directory: Path, settings: Mapping[str, Any]) -> None:
    """Raises UserError, naming up to three differences, where `directory` holds generations that were made with other values of these."""
    path = directory / "_settings.json"
    if not path.is_file():
        if any(directory.glob("part_*.parquet")):
            raise UserError(f"{directory}: holds generations, but no {path.name} to say of what; remove that directory to sample again")
        return
    try:
        kept = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{path}: not readable ({error}); remove {directory} to sample again") from None
    changed = [
        f"{key} was {json.dumps(kept.get(key))} and is {json.dumps(value)}" for key, value in settings.items() if kept.get(key) != value
    ]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"{directory}: holds generations of another evaluation: {', '.join(changed[:3])}{more}; choose another run.dir, or remove "
            "that directory to sample again"
        )


class Generations:
    """One benchmark's generations; nothing is created before the first `append`.

    settings: everything that generations and verdicts depend on, as plain JSON values. Raises UserError as `check_settings` does.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        check_settings(directory, settings)
        self.directory, self.settings = directory, settings

    def verdicts(self) -> list[list[Verdict]]:
        """Those of the samples of each problem that is kept: the benchmark's first ones. Raises UserError where a part is missing."""
        found: list[list[Verdict]] = []
        for part in self.parts():
            rows = _read(part, _VERDICT_COLUMNS)
            if not rows or rows[0]["problem"] != len(found):
                raise UserError(f"{part}: does not go on with problem {len(found)}; remove it and the later ones to sample them again")
            for row in rows:
                if row["problem"] == len(found):
                    found.append([])
                found[row["problem"]].append(Verdict(Outcome(row["outcome"]), Reason(row["reason"]), row["answer"]))
        return found

    def append(self, prompts: Sequence[Prompt], trajectories: Sequence[Trajectory], verdicts: Sequence[Verdict], first: int) -> None:
        """Writes a part: the samples of `prompts`, ordered by prompt and sample. first: the position of the first prompt."""
        if not (self.directory / "_settings.json").is_file():
            write_json(self.directory / "_settings.json", self.settings)
        rows = [_row(prompts[t.prompt], t, verdict, first + t.prompt) for t, verdict in zip(trajectories, verdicts, strict=True)]
        with replacing(self.directory / f"part_{len(self.parts()):05d}.parquet") as temporary:
            pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), temporary, compression="zstd")

    def parts(self) -> list[Path]:
        """The complete parts, in order."""
        return sorted(self.directory.glob("part_*.parquet"))


def _row(prompt: Prompt, trajectory: Trajectory, verdict: Verdict, problem: int) -> dict[str, Any]:
    return {
        "problem": problem,
        "problem_id": prompt.id,
        "sample": trajectory.sample,
        "response": trajectory.text,
        "tokens": trajectory.response_ids,
        "finish_reason": trajectory.finish_reason,
        "outcome": verdict.outcome.value,
        "reason": verdict.reason.value,
        "answer": verdict.answer,
        "reference": prompt.answer,
        "weight_version": trajectory.weight_version,
    }


def _read(part: Path, columns: list[str]) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = pq.read_table(part, columns=columns).to_pylist()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise UserError(
            f"{part}: not a part of an evaluation ({str(error).splitlines()[0]}); remove it and the later ones to sample them again"
        ) from None
    return rows
