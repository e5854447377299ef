"""What of the models under training is on the device: everything, their weights alone, or nothing.

May import: platform, the rest of training.

megatron-core 0.16.1 frees gradient buffers in place (distributed/distributed_data_parallel.py, offload_grad_buffers), which is used
here. Its optimizer's `offload_to_cpu` (optimizer/optimizer.py, line 344) gives tensors other storages: of an fp32 model, whose main
weights are the model's own, that would part the two, and it pins nothing. `HostMemory` moves storages instead. Its HybridDeviceOptimizer
(`optimizer_cpu_offload`) is for another purpose: it computes the update itself on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_nsr.platform.host_memory import HostMemory, storage_key
from megatron_nsr.training.scheduled_model import ScheduledModel


class Offload:
    """Each method says what is needed on the device next; what `level` allows to leave, leaves. No method is collective.

    level: `none` lets nothing leave; `optimizer` frees gradient buffers and FP8 copies of the weights, and moves main weights and Adam's
    moments to the host; `all` moves the parameters too. Gradients are zero after they come back.
    """

    def __init__(self, models: Sequence[ScheduledModel], level: Literal["none", "optimizer", "all"]) -> None:
        self._models, self._level = models, level
        self._optimizer, self._parameters = HostMemory(), HostMemory()
        self._buffered = [chunk for model in models for chunk in model.wrapped if isinstance(chunk, DistributedDataParallel)]

    def bring_all(self) -> None:
        """For an update or a checkpoint."""
        self._parameters.give_back()
        self._optimizer.give_back()
        for chunk in self._buffered:
            chunk.restore_grad_buffers(synchronize=self._on_gpu)

    def bring_weights(self) -> None:
        """For a push."""
        self._parameters.give_back()
        self._take_training_state()

    def take_away(self) -> None:
        """For sampling."""
        self._take_training_state()
        if self._level == "all":
            self._parameters.take(parameter for model in self._models for parameter in _parameters(model))
        if self._level != "none" and self._on_gpu:
            torch.cuda.empty_cache()  # the engine allocates by other means

    def _take_training_state(self) -> None:
        if self._level != "none":
            for chunk in self._buffered:
                chunk.offload_grad_buffers(synchronize=self._on_gpu, empty_cache=False)
            for model in self._models:
                _free_rounded_weights(model)
            self._optimizer.take(tensor for model in self._models for tensor in optimizer_tensors(model))

    @property
    def _on_gpu(self) -> bool:
        return any(model.groups.device.type == "cuda" for model in self._models)


def optimizer_tensors(model: ScheduledModel) -> Iterator[torch.Tensor]:
    """Main weights and moments that have memory of their own: the main weights of an fp32 model are the model's."""
    models_own = {storage_key(parameter) for parameter in _parameters(model)}
    for inner in getattr(model.optimizer, "chained_optimizers", [model.optimizer] if model.optimizer else []):
        mains = (main for group in inner.optimizer.param_groups for main in group["params"])
        yield from (main.detach() for main in mains if storage_key(main) not in models_own)
        # torch's Adam has its count of updates among them, a number on the host
        yield from (value for state in inner.optimizer.state.values() for value in state.values() if _has_dimensions(value))


def _free_rounded_weights(model: ScheduledModel) -> None:
    """What Transformer Engine 2.11 keeps of weights under model.fp8 (module/base.py); a schedule's first micro-batch makes it again."""
    for chunk in model.chunks:
        for module in chunk.modules():
            getattr(module, "_fp8_workspaces", {}).clear()


def _has_dimensions(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _parameters(model: ScheduledModel) -> Iterator[torch.Tensor]:
    for chunk in model.chunks:
        yield from chunk.parameters()
