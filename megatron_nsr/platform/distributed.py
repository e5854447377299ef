"""Starts and ends torch.distributed, for torchrun and for a single process alike.

May import: types, torch and the standard library.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_nsr.types import UserError

# A rank may grade or sample for a long time while the others wait in a collective.
TIMEOUT = timedelta(hours=2)


def init_process_group() -> None:
    """Initialises the default process group from torchrun's variables, or as a world of one without them.

    gloo on a CPU; nccl for CUDA tensors and gloo for CPU tensors where CUDA is available. Does nothing when already initialised.
    """
    if dist.is_initialized():
        return
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)


def free_port() -> int:
    """A TCP port of this host that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank() -> int:
    """This process's rank in the world; 0 where nothing is initialised."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Processes in the world; 1 where nothing is initialised."""
    return dist.get_world_size() if dist.is_initialized() else 1


def launched_rank() -> int:
    """The rank that torchrun gave this process, known before anything is initialised."""
    return int(os.environ.get("RANK", "0"))


def launched_world_size() -> int:
    """The processes that torchrun started, known before anything is initialised."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def broadcast_object(value: Any, source: int = 0) -> Any:
    """The picklable `value` of global rank `source`, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def all_gather_object(value: Any) -> list[Any]:
    """Every rank's picklable `value`, in rank order."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


@contextmanager
def rank_0_speaks_for_all() -> Iterator[None]:
    """Raises a UserError of rank 0's block on every rank: what rank 0 alone does and finds wrong must not leave the others waiting for it.

    Initialises the process group where there are several ranks. A collective call; the block itself must make none.
    """
    if launched_world_size() > 1:
        init_process_group()
    problem: UserError | None = None
    try:
        yield
    except UserError as error:
        problem = error
    told = broadcast_object(problem)
    if told is not None:
        raise told


def barrier() -> None:
    """Waits for every rank."""
    if world_size() > 1:
        dist.barrier()


def destroy() -> None:
    """Destroys the default process group where there is one. For a process that goes on, as a test does: a command just exits."""
    if dist.is_initialized():
        dist.destroy_process_group()
