"""Counts what torch runs and how much memory it makes."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = {"mm", "addmm", "addmm_", "_scaled_mm"}


class OpRecorder(TorchDispatchMode):
    """While active, of every operation in forward and backward passes: how often it ran, and the bytes that it allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.largest_bytes = self.live_bytes = self.peak_bytes = 0
        self._sizes: dict[int, int] = {}

    @property
    def products(self) -> int:
        """Matrix products."""
        return sum(self.counts[name] for name in PRODUCTS)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.counts[func.overloadpacket.__name__] += 1
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for output in tree_leaves(result):
            if isinstance(output, Tensor) and output.untyped_storage()._cdata not in given:
                self._allocated(output.untyped_storage())
        return result

    def _allocated(self, storage: Any) -> None:
        size = storage.nbytes()
        self.live_bytes += size
        self.largest_bytes, self.peak_bytes = max(self.largest_bytes, size), max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.live_bytes -= size
