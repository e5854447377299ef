"""Live bytes of all tensors of this process, operation by operation: storages that operations return, until they are freed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts while it is entered. `kept`: the most that lived at the start of a backward pass; `peak`: the most that lived at all."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.kept = 0
        self._sizes: dict[int, int] = {}
        self._task = -1

    def restart(self) -> None:
        """Forgets the peaks, not what lives."""
        self.peak = self.kept = self.live

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        task = torch._C._current_graph_task_id()
        if task != self._task:
            if self._task == -1:  # not the pass inside a backward pass that recomputing makes
                self.kept = max(self.kept, self.live)
            self._task = task
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._sizes and storage.nbytes():
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def storage_bytes(tensors: Any) -> int:
    """Of different storages, each once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
