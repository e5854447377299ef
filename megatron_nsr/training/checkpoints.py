"""Checkpoints of a run: complete or absent, with everything that the next step depends on.

May import: platform, types, megatron-core, the rest of training. Layout of RUN/checkpoints:

    step_N/state/      weights and optimizer, megatron-core's torch_dist format: loads at any parallel layout
    step_N/rng/        one file a rank: generators of torch, numpy, python and megatron-core
    step_N/ahead.pt    responses that were drawn ahead for the next step (rollout.max_staleness=1)
    step_N/run.json    step, sampler state, weight version, optimizer updates, layout, and the size of every other file
    step_N/*           config.json and tokenizer of the model, so that the folder can stand as `model.path`
    latest             a link to the newest complete step_N
"""

from __future__ import annotations

import json
import os
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
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy, get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_nsr.models.backends import Backend
from megatron_nsr.platform import distributed
from megatron_nsr.platform.model_files import copy_tokenizer
from megatron_nsr.types import UserError

RUN_FILE = "run.json"
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
    ) -> None:
        """Writes step_N under another name, renames it when complete, then moves `latest`. ahead: rank 0's, picklable."""
        partial, final = self.directory / f".partial-step_{step}", self.directory / f"step_{step}"
        if distributed.rank() == 0:
            for left in self.directory.glob(".partial-*"):  # by a killed run
                shutil.rmtree(left)
            (partial / "state").mkdir(parents=True)
            (partial / "rng").mkdir()
        distributed.barrier()
        torch.save(rng_state(), partial / "rng" / f"rank_{distributed.rank()}.pt")
        save_state(partial / "state", wrapped, optimizer, backend)
        distributed.barrier()
        if distributed.rank() == 0:
            if ahead is not None:
                torch.save(ahead, partial / AHEAD_FILE)
            shutil.copyfile(model_files / "config.json", partial / "config.json")
            copy_tokenizer(model_files, partial)
            description = {
                "step": step,
                "world_size": distributed.world_size(),
                "distributed_optimizer": _is_distributed(wrapped),
                "updates": _adam_step(optimizer),
                **run_state,
                "files": _sizes(partial),
            }
            (partial / RUN_FILE).write_text(json.dumps(description, indent=1))
            if final.exists():
                _remove(final)
            os.replace(partial, final)
            self._point_latest(final)
            self._prune(step)
        distributed.barrier()

    def load(self, path: Path, wrapped: Sequence[Any], optimizer: Any, backend: Backend) -> dict[str, Any]:
        """Restores weights, optimizer and generators; returns what `save` was given as `run_state`, with the step and `ahead`.

        On another number of ranks the generators start afresh: nothing that trains draws from them.
        """
        description = read_description(path)
        mine, theirs = _is_distributed(wrapped), description["distributed_optimizer"]
        if mine != theirs:  # megatron-core stores the two kinds of optimizer state under different names
            raise UserError(f"parallel.distributed_optimizer={str(mine).lower()}: checkpoint {path} was written with {str(theirs).lower()}")
        if description["updates"] == 0:  # megatron-core 0.16.1 writes no step then, and cannot load its optimizer without (optimizer.py)
            load_state(path / "state", wrapped, None, backend)
            optimizer.reload_model_params()
        else:
            load_state(path / "state", wrapped, optimizer, backend)
            if description["updates"] is not None:
                _set_adam_step(optimizer, description["updates"])
        if description["world_size"] == distributed.world_size():
            set_rng_state(torch.load(path / "rng" / f"rank_{distributed.rank()}.pt", weights_only=False))
        ahead = path / AHEAD_FILE
        return description | {"ahead": torch.load(ahead, weights_only=False) if ahead.is_file() else None}

    def _point_latest(self, target: Path) -> None:
        link = self.directory / ".new-latest"
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        os.replace(link, self.directory / "latest")

    def _prune(self, step: int) -> None:
        """Keeps the newest up to `latest`; later ones belong to a future that was given up, by pointing `latest` back."""
        named = {path.name.removeprefix("step_"): path for path in self.directory.glob("step_*")}
        steps = sorted((int(name), path) for name, path in named.items() if name.isdigit())
        past = [path for number, path in steps if number <= step]
        for path in [path for number, path in steps if number > step] + past[: -self.keep]:
            _remove(path)


def newest_checkpoint(directory: Path) -> Path | None:
    """What RUN/checkpoints/latest names, None before the first checkpoint. Raises UserError where it is not complete."""
    link = directory / "latest"
    if not link.is_symlink():
        return None
    found = link.resolve()
    read_description(found)
    return found


def read_description(path: Path) -> dict[str, Any]:
    """A checkpoint's run.json. Raises UserError naming the first file that is missing or has another size than when it was written."""
    remedy = "restore it from a copy, point `latest` at an older step, or choose another run.dir"
    try:
        description: dict[str, Any] = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))
        expected = description["files"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"checkpoint {path}: {RUN_FILE} cannot be read ({type(error).__name__}); {remedy}") from None
    found = _sizes(path)
    for name, size in expected.items():
        if name not in found:
            raise UserError(f"checkpoint {path}: the file {name} is missing; {remedy}")
        if found[name] != size:
            raise UserError(f"checkpoint {path}: the file {name} has {found[name]} bytes, not {size}; {remedy}")
    return description


def is_checkpoint(path: str | Path) -> bool:
    """Whether a `model.path` is a checkpoint of ours rather than a Hugging Face directory."""
    return (Path(path) / RUN_FILE).is_file()


def save_state(directory: Path, wrapped: Sequence[Any], optimizer: Any, backend: Backend) -> None:
    """Weights and optimizer in torch_dist format; `directory` exists and is empty."""
    _materialize_adam(optimizer)
    # On any device megatron-core 0.16.1 would start a manager process for the writer's results (strategies/filesystem_async.py), also
    # for a save in the foreground: it takes two seconds, and SIGTERM to a whole job kills it before the checkpoint that it asks for.
    filesystem_async._results_queue = queue.SimpleQueue()
    with backend.phase():
        dist_checkpointing.save(
            _sharded_state(wrapped, optimizer, is_loading=False), str(directory), get_default_save_sharded_strategy("torch_dist")
        )


def load_state(directory: Path, wrapped: Sequence[Any], optimizer: Any | None, backend: Backend) -> None:
    """Fills the model, and the optimizer where one is given, from a checkpoint written at any layout."""
    if optimizer is not None:
        _materialize_adam(optimizer)
    with backend.phase(), _readable(directory):
        loaded = dist_checkpointing.load(
            _sharded_state(wrapped, optimizer, is_loading=True), str(directory), get_default_load_sharded_strategy(str(directory))
        )
        for index, chunk in enumerate(wrapped):
            _bare(chunk).load_state_dict(loaded[f"model{index}"])
        if optimizer is not None:
            weights = _weight_sums(wrapped)
            optimizer.load_state_dict(loaded["optimizer"])
            _check_restored(optimizer, weights == _weight_sums(wrapped), directory)


def _weight_sums(wrapped: Sequence[Any]) -> list[float]:
    return [float(parameter.detach().double().sum()) for chunk in wrapped for parameter in chunk.parameters()]


def _check_restored(optimizer: Any, weights_unchanged: bool, directory: Path) -> None:
    """The optimizer holds the weights too, in fp32: where they are not the model's, its shards were restored from wrong places.

    megatron-core 0.16.1 does that for some layouts of the distributed optimizer, with a warning only (distrib_optimizer.py).
    """
    equal = weights_unchanged
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        model, main = getattr(inner, "shard_float16_groups", []), getattr(inner, "shard_fp32_from_float16_groups", [])
        for shards in zip(model, main, strict=True):
            equal &= all(torch.equal(mine, theirs.to(mine.dtype)) for mine, theirs in zip(*shards, strict=True))
    if not all(distributed.all_gather_object(equal)):
        raise RuntimeError(f"checkpoint {directory}: the optimizer's weights are not the model's (distributed optimizer)")


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
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    get_cuda_rng_tracker().set_states(state["megatron"])


def _sizes(checkpoint: Path) -> dict[str, int]:
    """Bytes of every file but run.json, by its path inside the checkpoint."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != RUN_FILE)
    return {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}


def _remove(directory: Path) -> None:
    """Removes a checkpoint under another name, so that a kill in between leaves no half of one."""
    condemned = directory.with_name(f".partial-old-{directory.name}")
    os.replace(directory, condemned)
    shutil.rmtree(condemned)


def _is_distributed(wrapped: Sequence[Any]) -> bool:
    return bool(wrapped[0].ddp_config.use_distributed_optimizer)


def _bare(chunk: Any) -> Any:
    return getattr(chunk, "module", chunk)


def _sharded_state(wrapped: Sequence[Any], optimizer: Any | None, *, is_loading: bool) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state: dict[str, Any] = {f"model{i}": _bare(chunk).sharded_state_dict(metadata=metadata) for i, chunk in enumerate(wrapped)}
    if optimizer is not None:
        models = {f"model{i}": state[f"model{i}"] for i in range(len(wrapped))} if len(wrapped) > 1 else {"model": state["model0"]}
        state["optimizer"] = optimizer.sharded_state_dict(models, is_loading=is_loading, metadata=metadata)
    return state


@contextmanager
def _readable(directory: Path) -> Iterator[None]:
    """Turns the reader's errors about broken files into a message that names the checkpoint."""
    try:
        yield
    except (EOFError, OSError, RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"checkpoint {directory}: cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:300]})") from error


def _adam_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The torch Adam instances inside megatron-core's wrappers; none where Apex's or Transformer Engine's Adam runs."""
    inner = [item.optimizer for item in getattr(optimizer, "chained_optimizers", [optimizer])]
    return [item for item in inner if isinstance(item, torch.optim.Adam)]


def _materialize_adam(optimizer: Any) -> None:
    """Gives Adam the state it creates at its first step: megatron-core 0.16.1 cannot save or load torch's Adam without it."""
    for adam in _adam_optimizers(optimizer):
        for group in adam.param_groups:
            for parameter in group["params"]:
                if not adam.state[parameter]:
                    zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                    adam.state[parameter].update(step=torch.tensor(0.0), **zeros)


def _adam_step(optimizer: Any) -> float | None:
    """Updates so far; None where the optimizer is not torch's Adam, which keeps and restores the count itself."""
    for adam in _adam_optimizers(optimizer):
        for state in adam.state.values():
            return float(state["step"])
    return None


def _set_adam_step(optimizer: Any, step: float) -> None:
    """The distributed optimizer of megatron-core 0.16.1 does not restore torch Adam's step count (distrib_optimizer.py)."""
    for adam in _adam_optimizers(optimizer):
        for state in adam.state.values():
            state["step"] = torch.tensor(step)
