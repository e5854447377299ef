"""Responses that stay the same for a whole run, on which the policy's entropy is measured teacher-forced.

May import: types, training, rollout, data, observability, the rest of evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_nsr.data.references import reference_trajectory
from megatron_nsr.data.tokenizers import Tokenizer
from megatron_nsr.evaluation.benchmarks import Benchmarks
from megatron_nsr.observability.run_directory import replacing
from megatron_nsr.platform import distributed
from megatron_nsr.training.actor import Actor
from megatron_nsr.types import Prompt, Trajectory, UserError

SCHEMA = pa.schema(
    [
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
        ("rollout_logprobs", pa.list_(pa.float32())),
        ("finish_reason", pa.string()),
        ("weight_version", pa.int64()),
        ("text", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class FixedResponses:
    """The same on every rank; may be empty."""

    trajectories: tuple[Trajectory, ...] = ()

    def measure(self, actor: Actor) -> dict[str, float]:
        """Entropy and log-prob of the actor's weights, means over response tokens: one forward pass. A collective call."""
        if not self.trajectories:
            return {}
        measured = actor.measure_samples(self.trajectories)
        return {"heldout/entropy_fixed": measured["policy/entropy"], "heldout/logprob_fixed": measured["policy/logprob"]}


def fixed_responses(path: Path, benchmarks: Benchmarks, tokenizer: Tokenizer, *, draw: bool) -> FixedResponses:
    """The run's fixed responses: what `path` holds, or else made now and kept there. A collective call.

    They are the `response` column of the benchmarks' problems where every problem has one, cut at the response budget of training;
    otherwise, with `draw`, they are sampled as in training from the weights that were pushed last. Raises UserError where `path` is
    no such file.
    """
    known: tuple[Trajectory, ...] | None = distributed.broadcast_object(_read(path) if distributed.rank() == 0 and path.is_file() else None)
    if known is not None:
        return FixedResponses(known)
    prompts = [prompt for problems in benchmarks.benchmarks.values() for prompt in problems.prompts]
    if all(prompt.response is not None for prompt in prompts):
        made = _given(prompts, tokenizer, benchmarks.plain.max_tokens)
    else:
        made = benchmarks.draw_heldout() if draw else []
    if made and distributed.rank() == 0:
        _write(path, made)
    return FixedResponses(tuple(made))


def _given(prompts: Sequence[Prompt], tokenizer: Tokenizer, max_tokens: int) -> list[Trajectory]:
    whole = (reference_trajectory(tokenizer, index, prompt) for index, prompt in enumerate(prompts))
    return [replace(t, response_ids=t.response_ids[:max_tokens], rollout_logprobs=t.rollout_logprobs[:max_tokens]) for t in whole]


def _write(path: Path, trajectories: Sequence[Trajectory]) -> None:
    rows = [{name: getattr(trajectory, name) for name in SCHEMA.names} for trajectory in trajectories]
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), temporary)


def _read(path: Path) -> tuple[Trajectory, ...]:
    try:
        rows = pq.read_table(path, columns=SCHEMA.names).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a file of fixed responses ({str(error).splitlines()[0]}); restore it, or remove it") from None
    return tuple(
        Trajectory(
            prompt=index,
            sample=0,
            prompt_ids=tuple(row["prompt_ids"]),
            response_ids=np.asarray(row["response_ids"], np.int32),
            rollout_logprobs=np.asarray(row["rollout_logprobs"], np.float32),
            finish_reason=row["finish_reason"],
            weight_version=row["weight_version"],
            text=row["text"],
        )
        for index, row in enumerate(rows)
    )
