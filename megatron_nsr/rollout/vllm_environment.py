"""What vLLM needs set before its import, and what of the process and host must be put right after it.

May import: numpy, torch and the standard library; vLLM only in functions.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
import torch.distributed as dist


def prepare_environment(*, on_cpu: bool, in_process: bool) -> None:
    """Sets vLLM's environment variables; it reads them at its import, so this comes first. A user's own choice wins where it can."""
    if in_process:  # weights are handed over as tensors, and ranks that share an engine need it (external_launcher)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    else:
        os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # the endpoints through which weights come
        os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of vLLM and torch about themselves, repeated by every process
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # no telemetry: vLLM would report each start over the network
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # its start-up lines (about 60 a rank) would bury the run's own log
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if on_cpu:
        # a server would bind itself to the first cores, and so would the next one on the same host
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        # otherwise the first generate with log-probs compiles a counting helper for 3 to 10 s (vllm/v1/sample/ops/logprobs.py, 0.32.0)
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
        if "torch._dynamo" in sys.modules:  # imported earlier: the variable comes too late for it
            sys.modules["torch._dynamo"].config.disable = os.environ["TORCH_COMPILE_DISABLE"] == "1"


@contextmanager
def caller_state_kept() -> Iterator[None]:
    """Puts back the random states that vLLM's start seeds and its sampling consumes, and torch.set_num_threads.

    vllm/v1/worker/cpu_worker.py (0.32.0) replaces set_num_threads for the whole process by a function that does nothing.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    numpy_state, python_state, set_num_threads = np.random.get_state(), random.getstate(), torch.set_num_threads
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        torch.set_num_threads = set_num_threads


@contextmanager
def default_process_group_kept() -> Iterator[None]:
    """While vLLM shuts down, keeps the default process group, which it would destroy although it did not make it.

    vllm/distributed/parallel_state.py, destroy_distributed_environment (0.32.0). Groups of its own are destroyed.
    """
    destroy = dist.destroy_process_group

    def destroy_named(group: dist.ProcessGroup | None = None) -> None:
        if group is not None:
            destroy(group)

    dist.destroy_process_group = destroy_named
    try:
        yield
    finally:
        dist.destroy_process_group = destroy


@contextmanager
def private_shared_memory() -> Iterator[None]:
    """Gives the shared memory of ranks that host one CPU engine a name of this job's own, and unlinks it once all have mapped it.

    vllm/distributed/device_communicators/cpu_communicator.py (0.32.0) derives the name from the init method, which under
    external_launcher is the same for every job on a host, and a killed job leaves the segment behind: the next start fails
    with errno 17. Enter it on every rank of the default process group.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    token: list[Any] = [uuid4().hex]
    dist.broadcast_object_list(token, src=0)
    original = _CPUSHMDistributed.make_group_name
    _CPUSHMDistributed.make_group_name = staticmethod(lambda communicator: f"{token[0]}-{original(communicator).replace('/', '')}")
    try:
        yield
        dist.barrier()
    finally:
        _CPUSHMDistributed.make_group_name = original
        for segment in Path("/dev/shm").glob(f"*{token[0]}*"):
            segment.unlink(missing_ok=True)
