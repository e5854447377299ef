"""Checksums of whole tensors, what an engine that holds them must come to."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from megatron_nsr.weights.checksums import checksum


def whole_checksums(tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> dict[str, int]:
    return {name: int(checksum(tensor, torch.arange(len(tensor)), 0, dtype)) for name, tensor in tensors}
