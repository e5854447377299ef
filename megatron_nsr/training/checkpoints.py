"""Checkpoints of a run: complete or absent, with everything that the next step depends on.

May import: platform, types, megatron-core, the rest of training. Layout of RUN/checkpoints:

    step_N/state/      weights and optimizer, megatron-core's torch_dist format: loads at any parallel layout
    step_N/critic/     the critic's (objective.name=ppo), in the same form
    step_N/rng/        one file a rank: generators of torch, numpy, python and megatron-core
    step_N/ahead.pt    responses that were drawn ahead for the next step (rollout.max_staleness=1)
    step_N/run.json    format, step, sampler state, weight version, number of ranks, and the size of every other file
    step_N/*           config.json and tokenizer of the model, so that the folder can stand as `model.path`
    latest             a link to the newest complete step_N
    best               a link to the step_N that validation chose, where there is one
"""

from __future__ import annotations

import os
import pickle
import queue
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy, get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from megatron_nsr.models.backends import Backend
from megatron_nsr.platform import distributed
from megatron_nsr.platform.host_memory import require_present
from megatron_nsr.platform.model_files import copy_tokenizer
from megatron_nsr.training.checkpoint_files import REMEDY, RESUME_REMEDY, newest_checkpoint, read_description, write_description
from megatron_nsr.training.optimizer_state import OptimizerState
from megatron_nsr.training.scheduled_model import ScheduledModel
from megatron_nsr.types import UserError

EXTRA_STATE = "_extra_state"
# What torch and megatron-core raise for broken files; the first is no Exception, and holds each rank's own.
DAMAGE = (CheckpointException, CheckpointingException, pickle.UnpicklingError, EOFError, OSError, RuntimeError, LookupError, ValueError)
AHEAD_FILE = "ahead.pt"


class Checkpoints:
    """Writes and reads RUN/checkpoints. Every rank calls `save` and `load`; rank 0 moves the files."""

    def __init__(self, directory: Path, *, keep: int) -> None:
        self.directory, self.keep = directory, keep

    def latest(self) -> Path | None:
        """The newest complete checkpoint, the same on every rank."""
        found: Path | None = distributed.broadcast_object(newest_checkpoint(self.directory) if distributed.rank() == 0 else None)
        return found

    def save(
        self,
        step: int,
        run_state: Mapping[str, Any],
        wrapped: Sequence[Any],
        optimizer: Any,
        backend: Backend,
        model_files: Path,
        ahead: Any = None,
        critic: ScheduledModel | None = None,
    ) -> None:
        """Writes step_N under another name, renames it when complete, then moves `latest`. ahead: rank 0's, picklable."""
        partial, final = self.directory / f".partial-step_{step}", self.directory / f"step_{step}"
        if distributed.rank() == 0:
            for left in self.directory.glob(".partial-*"):  # by a killed run
                shutil.rmtree(left)
            for name in ("state", "rng", *(["critic"] if critic else [])):
                (partial / name).mkdir(parents=True)
        distributed.barrier()
        torch.save(rng_state(), partial / "rng" / f"rank_{distributed.rank()}.pt")
        save_state(partial / "state", wrapped, optimizer, backend)
        if critic:
            save_state(partial / "critic", critic.wrapped, critic.optimizer, backend)
        distributed.barrier()
        if distributed.rank() == 0:
            if ahead is not None:
                torch.save(ahead, partial / AHEAD_FILE)
            shutil.copyfile(model_files / "config.json", partial / "config.json")
            copy_tokenizer(model_files, partial)
            description = {
                "step": step,
                "world_size": distributed.world_size(),
                **run_state,
            }
            write_description(partial, description)
            if final.exists():
                _remove(final)
            os.replace(partial, final)
            self._point("latest", final)
            self._prune(step)
        distributed.barrier()

    def load(
        self, path: Path, wrapped: Sequence[Any], optimizer: Any, backend: Backend, critic: ScheduledModel | None = None
    ) -> dict[str, Any]:
        """Restores weights, optimizer and generators; returns what `save` was given as `run_state`, with the step and `ahead`.

        On another number of ranks, and on the other kind of device, the generators start afresh: nothing that trains draws from them.
        """
        description = read_description(path, RESUME_REMEDY)
        load_state(path / "state", wrapped, optimizer, backend)
        if critic:
            load_state(path / "critic", critic.wrapped, critic.optimizer, backend)
        if description["world_size"] == distributed.world_size():
            with _readable(path, RESUME_REMEDY):
                set_rng_state(torch.load(path / "rng" / f"rank_{distributed.rank()}.pt", weights_only=False))
        ahead = path / AHEAD_FILE
        with _readable(path, RESUME_REMEDY):
            return description | {"ahead": torch.load(ahead, weights_only=False) if ahead.is_file() else None}

    def point_best(self, ranking: Sequence[int]) -> None:
        """Points `best` to the first of these steps that is still there; without one there is no link. `_prune` keeps what it names."""
        chosen = next((path for step in ranking if (path := self.directory / f"step_{step}").is_dir()), None)
        if chosen is not None:
            self._point("best", chosen)
        else:
            (self.directory / "best").unlink(missing_ok=True)

    def _point(self, name: str, target: Path) -> None:
        link = self.directory / f".new-{name}"
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        os.replace(link, self.directory / name)

    def _prune(self, step: int) -> None:
        """Keeps the newest up to `latest` and the best; later ones belong to a future that was given up, by pointing `latest` back."""
        named = {path.name.removeprefix("step_"): path for path in self.directory.glob("step_*")}
        steps = sorted((int(name), path) for name, path in named.items() if name.isdigit())
        past = [path for number, path in steps if number <= step]
        best = (self.directory / "best").resolve().name
        given_up = [path for number, path in steps if number > step]
        for path in given_up + [path for path in past[: -self.keep] if path.name != best]:
            _remove(path)


def save_state(directory: Path, wrapped: Sequence[Any], optimizer: Any, backend: Backend) -> None:
    """Weights and optimizer in torch_dist format; `directory` exists and is empty. Raises OSError where it cannot be written."""
    # On any device megatron-core 0.16.1 would start a manager process for the writer's results (strategies/filesystem_async.py), also
    # for a save in the foreground: it takes two seconds, and SIGTERM to a whole job kills it before the checkpoint that it asks for.
    filesystem_async._results_queue = queue.SimpleQueue()
    with backend.phase():
        state = _model_state(wrapped)
        state["optimizer"] = OptimizerState(optimizer, state).to_save()
        try:
            dist_checkpointing.save(state, str(directory), get_default_save_sharded_strategy("torch_dist"))
        except CheckpointException as error:
            free = shutil.disk_usage(directory).free >> 20
            raise OSError(f"checkpoint {directory}: cannot be written, with {free} MiB free there ({_cause(error)})") from error


def load_state(directory: Path, wrapped: Sequence[Any], optimizer: Any | None, backend: Backend) -> None:
    """Fills the model, and the optimizer where one is given, from a checkpoint written at any layout."""
    with backend.phase():
        state = _model_state(wrapped)
        optimizer_state = None if optimizer is None else OptimizerState(optimizer, state)
        with _readable(directory, REMEDY if optimizer is None else RESUME_REMEDY):
            if optimizer_state is not None:
                state["optimizer"] = optimizer_state.to_load()
            loaded = dist_checkpointing.load(state, str(directory), get_default_load_sharded_strategy(str(directory)))
            for index, chunk in enumerate(wrapped):
                _bare(chunk).load_state_dict(_with_extra_state(loaded[f"model{index}"], _bare(chunk)))
            if optimizer_state is not None:
                optimizer_state.fill(loaded["optimizer"])


def rng_state() -> dict[str, Any]:
    """The generators of this rank."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": np.random.get_state(),
        "python": random.getstate(),
        "megatron": get_cuda_rng_tracker().get_states(),
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Does nothing with the states of the other kind of device: megatron-core's are of the CUDA generator, or here of the CPU's."""
    if (state["cuda"] is not None) != torch.cuda.is_available():
        return
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    get_cuda_rng_tracker().set_states(state["megatron"])


def _remove(directory: Path) -> None:
    """Removes a checkpoint under another name, so that a kill in between leaves no half of one."""
    condemned = directory.with_name(f".partial-old-{directory.name}")
    os.replace(directory, condemned)
    shutil.rmtree(condemned)


def _bare(chunk: Any) -> Any:
    return getattr(chunk, "module", chunk)


def _model_state(wrapped: Sequence[Any]) -> dict[str, Any]:
    require_present((parameter for chunk in wrapped for parameter in chunk.parameters()), "the model's weights")
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    return {f"model{i}": _without_extra_state(_bare(chunk).sharded_state_dict(metadata=metadata)) for i, chunk in enumerate(wrapped)}


def _without_extra_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Less what layers keep for FP8 (the scales of model.fp8=delayed): each backend has other layers that would ask for it."""
    return {name: value for name, value in state.items() if not _is_extra_state(name)}


def _with_extra_state(state: Mapping[str, Any], chunk: Any) -> dict[str, Any]:
    """A state that the chunk's strict `load_state_dict` takes: of None a layer keeps the extra state that it has."""
    return {**state, **{name: None for name in chunk.state_dict() if _is_extra_state(name)}}


def _is_extra_state(name: str) -> bool:
    """Those of experts have a number behind (megatron-core 0.16.1, extensions/transformer_engine.py, TEGroupedLinear)."""
    return name.rpartition(".")[2].startswith(EXTRA_STATE)


@contextmanager
def _readable(directory: Path, remedy: str) -> Iterator[None]:
    """Turns the reader's errors about broken files into a message that names the checkpoint."""
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError, and no damage
        raise
    except DAMAGE as error:
        raise UserError(f"checkpoint {directory}: cannot be read ({_cause(error)}); {remedy}") from error


def _cause(error: BaseException) -> str:
    """What went wrong, without torch's advice for files that are whole; the first rank's where torch gathered it from several."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {' '.join(str(error).split()).split('. In PyTorch')[0][:300]}"
