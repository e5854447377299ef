"""How the bytes of a push get from the trainer to rollout servers.

May import: this package, safetensors, torch, the standard library. A transport is told of the servers that take part, then sends
buckets of tensors; the servers load what comes while `announce` runs, which asks all of them at once.
"""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_nsr.platform.distributed import free_port
from megatron_nsr.rollout.vllm_api import join_nccl_group, nccl_init_info, nccl_update_info

Bucket = Sequence[tuple[str, torch.Tensor]]
Announce = Callable[[dict[str, Any]], None]  # POSTs one update_info to every server and returns when all have loaded it


class TransportError(Exception):
    """The bytes of a push could not be sent on; the servers are not to blame."""


class Transport(Protocol):
    def connect(self, members: Sequence[tuple[str, int]], initialize: Callable[[list[dict[str, Any]]], None]) -> None:
        """members: (identity, workers) of each server; initialize: POSTs an init_info to each of them."""
        ...

    def send(self, bucket: Bucket, announce: Announce) -> None: ...


class FileTransport:
    """For servers that see the trainer's temporary directory (TMPDIR), as on one host: a safetensors file a bucket, gone once loaded."""

    def connect(self, members: Sequence[tuple[str, int]], initialize: Callable[[list[dict[str, Any]]], None]) -> None:
        initialize([{} for _ in members])

    def send(self, bucket: Bucket, announce: Announce) -> None:
        """Raises TransportError where there is no room for the file."""
        with ExitStack() as stack:
            announce({"path": str(_written(bucket, stack))})


def _written(bucket: Bucket, stack: ExitStack) -> Path:
    try:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="megatron_nsr_push_"))) / "bucket.safetensors"
        save_file(_in_memory_of_its_own(bucket), path)
    except (OSError, SafetensorError) as error:
        raise TransportError(f"weights for the rollout servers could not be written to TMPDIR={tempfile.gettempdir()}: {error}") from error
    return path


class NcclTransport:
    """vLLM's own NCCL backend, for CUDA: rank 0 of the trainer and all workers of all servers form one group. Has not run yet."""

    def __init__(self) -> None:
        self._members: list[tuple[str, int]] = []
        self._group: Any = None

    def connect(self, members: Sequence[tuple[str, int]], initialize: Callable[[list[dict[str, Any]]], None]) -> None:
        """Makes the group anew only where a server was lost or has come (back)."""
        if list(members) == self._members:
            return
        self._members = []
        address, port = own_address(), free_port()
        world_size, infos = 1, []
        for _, workers in members:
            infos.append((world_size, workers))
            world_size += workers
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(initialize, [nccl_init_info(address, port, first_rank=first, world_size=world_size) for first, _ in infos])
            self._group = join_nccl_group(address, port, world_size)
            asked.result()
        self._members = list(members)

    def send(self, bucket: Bucket, announce: Announce) -> None:
        stream = torch.cuda.current_stream()
        with ThreadPoolExecutor(1) as pool:
            loaded = pool.submit(announce, nccl_update_info(bucket))
            for _, tensor in bucket:
                self._group.broadcast(tensor.contiguous(), src=0, stream=stream)
            stream.synchronize()
            loaded.result()


def _in_memory_of_its_own(bucket: Bucket) -> dict[str, torch.Tensor]:
    """What safetensors writes: an embedding that is pushed as the head too is copied."""
    seen: set[int] = set()
    apart: dict[str, torch.Tensor] = {}
    for name, tensor in bucket:
        apart[name] = tensor.clone() if tensor.data_ptr() in seen else tensor.contiguous()
        seen.add(tensor.data_ptr())
    return apart


def own_address() -> str:
    """An address of this host that other hosts reach."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: only looks up the route
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"
