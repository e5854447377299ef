"""What megatron-core 0.16.1 needs to run on a torch build without CUDA, in one place; `PATCHED_CALL_SITES` lists what and why.

May import: megatron.core and the standard library. Never loads where CUDA is available.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode


class CallSite(NamedTuple):
    """One upstream place that a patch below serves."""

    file: str  # below megatron/core, release 0.16.1
    what: str
    why: str
    until: str


_NAMES = "install(): torch.cuda.current_device and torch.cuda.synchronize"
_PHASE = "megatron_phase(): device='cuda', Tensor.cuda(), Tensor.type()"
_TRACKER = "install(): the random number tracker"
_ROUTER = "install(): moe_utils.te_general_gemm"
_DEVICE_TAKEN = "the file takes its device from a parameter or the process group"

PATCHED_CALL_SITES: tuple[CallSite, ...] = (
    CallSite(
        "models/common/embeddings/rotary_pos_embedding.py",
        _NAMES,
        "moves inv_freq to torch.cuda.current_device() when first called",
        _DEVICE_TAKEN,
    ),
    CallSite(
        "tensor_parallel/mappings.py", _NAMES, "allocates what sequence-parallel collectives receive on current_device()", _DEVICE_TAKEN
    ),
    CallSite(
        "tensor_parallel/layers.py",
        _NAMES,
        "allocates the gathered input of a sequence-parallel linear layer on current_device()",
        _DEVICE_TAKEN,
    ),
    CallSite("utils.py", _NAMES, "GlobalMemoryBuffer allocates on current_device()", _DEVICE_TAKEN),
    CallSite(
        "pipeline_parallel/p2p_communication.py",
        _NAMES,
        "allocates received activations and their shapes, then synchronizes",
        _DEVICE_TAKEN,
    ),
    CallSite("distributed/param_and_grad_buffer.py", _NAMES, "allocates parameter and gradient buffers on current_device()", _DEVICE_TAKEN),
    CallSite("dist_checkpointing/strategies/filesystem_async.py", _NAMES, "synchronizes before it writes", "it asks whether CUDA is there"),
    CallSite("dist_checkpointing/strategies/state_dict_saver.py", _PHASE, "counts failures in a tensor on 'cuda'", _DEVICE_TAKEN),
    CallSite("pipeline_parallel/schedules.py", _PHASE, "counts tokens in a tensor on 'cuda'", _DEVICE_TAKEN),
    CallSite(
        "optimizer/optimizer.py",
        _PHASE,
        "overflow flag and loss scale on 'cuda'; groups parameters by the names torch.cuda.*Tensor",
        _DEVICE_TAKEN,
    ),
    CallSite(
        "optimizer/clip_grads.py", _PHASE, "the norm's tensors on 'cuda'; asserts that gradients are torch.cuda.FloatTensor", _DEVICE_TAKEN
    ),
    CallSite(
        "models/common/language_module/language_module.py", _PHASE, "Tensor.cuda() on embeddings tied over pipeline stages", _DEVICE_TAKEN
    ),
    CallSite(
        "tensor_parallel/random.py",
        _TRACKER,
        "reads and writes the CUDA generator's state (dropout regions, recomputation)",
        "trackers take a device",
    ),
    CallSite(
        "transformer/moe/moe_utils.py",
        _ROUTER,
        "RouterGatingLinearFunction reads te_general_gemm, which is not defined where Transformer Engine cannot be imported",
        "it is None there, as in extensions/transformer_engine.py",
    ),
)

_CPU = torch.device("cpu")
_TENSOR_TYPE = torch.Tensor.type
_TENSOR_CUDA = torch.Tensor.cuda
_TENSOR_TO = torch.Tensor.to
_installed = False


def install() -> None:
    """Replaces the process-wide names and the random number tracker; a second call does nothing.

    Raises RuntimeError where CUDA is available, and where psutil is missing: megatron-core's checkpoint writer imports it in a
    child process without declaring it, and the save then waits for ever (dist_checkpointing/strategies/filesystem_async.py).
    """
    global _installed
    if torch.cuda.is_available():
        raise RuntimeError("the CPU patches for megatron-core must not be installed where CUDA is available; use the te backend")
    if importlib.util.find_spec("psutil") is None:
        raise RuntimeError("psutil is not installed; without it megatron-core's checkpoint save never returns")
    if _installed:
        return
    torch.cuda.current_device = _current_device
    torch.cuda.synchronize = _synchronize
    _install_random_tracker()
    _install_router_product()
    _installed = True


def _current_device() -> torch.device:
    return _CPU


def _synchronize(device: Any = None) -> None:
    """Nothing runs behind our back on a CPU."""


def _install_random_tracker() -> None:
    """Puts a tracker in place that forks the CPU generator instead of the CUDA one."""
    from megatron.core.tensor_parallel import random as upstream

    class CpuRandomTracker(upstream.CudaRNGStatesTracker):
        def add(self, name: str, seed: int) -> None:
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"random state {name!r} with seed {seed} exists already")
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = upstream._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            outside = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outside)

    upstream._CUDA_RNG_STATE_TRACKER = CpuRandomTracker()
    upstream._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    upstream._get_cuda_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    upstream._set_cuda_rng_state = lambda *_args, **_kwargs: None  # recomputation restores the CPU generator itself


def _install_router_product() -> None:
    """Lets the router fall back to torch's matrix product."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def megatron_phase() -> contextlib.AbstractContextManager[Any]:
    """A context in which device "cuda" means the CPU. Enter it around megatron-core calls only: it costs vLLM 10 % of its speed."""
    return _CudaNamesOnCpu()


class _CudaNamesOnCpu(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _TENSOR_CUDA:
            return args[0]
        if func is _TENSOR_TYPE and len(args) == 1 and not kwargs:
            return _type_name(func(args[0]))
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        elif func is _TENSOR_TO and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


def _type_name(name: str) -> str:
    """megatron-core compares type names with torch.cuda.FloatTensor; everyone else must see the truth."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and "megatron/core" not in frame.f_code.co_filename:
        frame = frame.f_back
    return name if frame is None or "cuda" in name else name.replace("torch.", "torch.cuda.", 1)
