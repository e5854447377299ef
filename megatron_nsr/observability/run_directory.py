"""A run's directory: where everything lies, atomic writes, and the check that a resumed run is the same experiment.

May import: config, types and libraries.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from megatron_nsr.config import Config
from megatron_nsr.config_files import dump_config, load_config
from megatron_nsr.types import UserError

# What a resumed run may change: where and how fast it runs and what it records, never what it learns from.
MAY_CHANGE = frozenset(
    {
        "run.dir",  # the directory may have moved
        "run.steps",
        "rollout.mode",
        "rollout.servers",
        "rollout.server_timeout_s",
        "rollout.max_num_seqs",
        "rollout.kv_cache_mib",
        "rollout.gpu_memory_utilization",
        "rollout.push_bucket_mib",
        "rollout.verify_push",
        "rollout.enforce_eager",
        "rollout.sleep_level",
        "rollout.tensor_parallel",
        "rollout.max_logprob_gap",
        "reward.workers",
        "reward.timeout_s",
        "reward.memory_limit_mib",
        "reward.cache_size",
    }
)
SECTIONS_THAT_MAY_CHANGE = frozenset({"parallel", "logging", "checkpoint", "evaluation", "training"})
DIFFERENCES_SHOWN = 3
ABSENT = "(absent)"


@dataclass(frozen=True)
class RunDirectory:
    """Paths inside one run's directory; nothing is created by naming it."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def state(self) -> Path:
        return self.path / "state.json"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def wandb(self) -> Path:
        return self.path / "wandb"

    @property
    def mlflow_run_id(self) -> Path:
        """Names the run in MLflow that a resumed run goes on with."""
        return self.path / "mlflow_run_id"

    @property
    def hf(self) -> Path:
        """The final policy as a Hugging Face directory."""
        return self.path / "hf"

    def export(self, step: int) -> Path:
        """The policy after a step as a Hugging Face directory."""
        return self.path / "exports" / f"step_{step}"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def latest(self) -> Path:
        """What names the newest complete checkpoint."""
        return self.checkpoints / "latest"

    @property
    def best(self) -> Path:
        """What names the checkpoint with the best validation Pass@1, where data.validation is set."""
        return self.checkpoints / "best"

    @property
    def fixed_responses(self) -> Path:
        """The responses on which heldout/entropy_fixed is measured at every evaluation."""
        return self.path / "fixed_responses.parquet"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step}"

    def evaluation(self, step: int) -> Path:
        return self.path / "eval" / f"step_{step}.json"

    def generations(self, step: int, benchmark: str) -> Path:
        """The directory of what an evaluation of a step's weights sampled."""
        return self.path / "eval" / f"step_{step}" / quote(benchmark, safe=" ")

    def samples(self, step: int) -> Path:
        return self.path / "samples" / f"step_{step}.parquet"

    def evaluation_steps(self) -> list[int]:
        """Steps with an evaluation, ascending."""
        return _steps_in(self.path / "eval", ".json")

    def sample_steps(self) -> list[int]:
        """Steps whose trajectories were kept, ascending."""
        return _steps_in(self.path / "samples", ".parquet")


def locate_run(config: Config) -> RunDirectory:
    """The run that `run.dir` names, new or to be resumed; creates and changes nothing.

    Raises UserError where it is no directory, or holds a run whose config differs in a field that a resume may not change.
    """
    run = RunDirectory(Path(config.run.dir))
    existing = next(path for path in (run.path.absolute(), *run.path.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"run.dir={config.run.dir}: cannot be a directory ({existing.name} is a file); choose another run.dir")
    if run.config.is_file():
        _check_resumable(run, config)
    return run


def open_run(config: Config) -> RunDirectory:
    """Creates `run.dir`, or resumes the run that it holds; either way its config.yaml is `config` afterwards.

    Raises UserError as `locate_run` does, and where the directory cannot be made.
    """
    run = locate_run(config)
    try:
        run.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.dir={config.run.dir}: cannot be a directory ({error.strerror}); choose another run.dir") from None
    write_atomic(run.config, dump_config(config))
    return run


def flat_config(config: Config) -> dict[str, Any]:
    """The config as `section.field: value`, in the schema's order."""
    return flatten(config.model_dump(mode="json", by_alias=True))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys; an empty mapping leaves no key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on leaving it is synced and renamed to `path`, on an error removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> None:
    """Writes a text file that a reader sees either whole or not at all, even across a power cut."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object atomically, indented, in the given key order."""
    write_atomic(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _check_resumable(run: RunDirectory, config: Config) -> None:
    try:
        stored = flat_config(load_config(run.config))
    except UserError as error:
        raise UserError(f"run.dir={run.path}: the config of the run it holds cannot be read; choose another run.dir ({error})") from None
    given = flat_config(config)
    keys = list(dict.fromkeys([*given, *stored]))
    # The cosine schedule ends at the last step: with another one the learning rate would jump.
    fixed = {"run.steps"} if config.optimizer.schedule == "cosine" else set()
    changed = [key for key in keys if (key in fixed or not _may_change(key)) and stored.get(key, ABSENT) != given.get(key, ABSENT)]
    if changed:
        shown = ", ".join(f"{key} was {_show(stored, key)} and is {_show(given, key)}" for key in changed[:DIFFERENCES_SHOWN])
        more = f" and {len(changed) - DIFFERENCES_SHOWN} more" if len(changed) > DIFFERENCES_SHOWN else ""
        raise UserError(f"run.dir={run.path}: holds a run with another config: {shown}{more}; choose another run.dir")


def _may_change(key: str) -> bool:
    return key in MAY_CHANGE or key.partition(".")[0] in SECTIONS_THAT_MAY_CHANGE or key.startswith("model.transformer.")


def _show(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else ABSENT


def _steps_in(directory: Path, suffix: str) -> list[int]:
    stems = [path.stem.removeprefix("step_") for path in directory.glob(f"step_*{suffix}")]
    return sorted(int(stem) for stem in stems if stem.isdigit())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
