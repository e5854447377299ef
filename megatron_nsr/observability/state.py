"""RUN/state.json: what a run is doing, for whoever cannot see its exit status (torchrun turns a rank's status into 1).

May import: types and libraries.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Literal, get_args

from megatron_nsr.observability.run_directory import RunDirectory, write_json
from megatron_nsr.types import UserError

Status = Literal["running", "stopped", "failed", "done"]


@dataclass(frozen=True, slots=True)
class RunState:
    """step: training steps completed; reason: one line for a person; time: when it was written, UTC, ISO 8601."""

    status: Status
    step: int
    reason: str
    time: str


def write_state(run: RunDirectory, status: Status, step: int, reason: str = "") -> None:
    """Replaces RUN/state.json atomically."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(run.state, asdict(RunState(status, step, reason, now)))


def read_state(run: RunDirectory) -> RunState | None:
    """The state last written, or None before the first; raises UserError where the file is not one of ours."""
    if not run.state.is_file():
        return None
    try:
        state = RunState(**json.loads(run.state.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{run.state}: not a state file ({error})") from None
    if state.status not in get_args(Status):
        raise UserError(f"{run.state}: status={state.status!r} is none of {', '.join(get_args(Status))}")
    return state
