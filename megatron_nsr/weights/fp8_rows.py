"""The rounding that rollouts in FP8 give the weights of linear layers: e4m3 with one scale a row.

May import: torch. As vLLM does it on pushed weights ("fp8_per_channel", model_executor/layers/quantization/online/fp8.py, 0.26 and 0.32).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max


def is_rounded(name: str) -> bool:
    """Whether a tensor of that HF name is the weight of a linear layer; embedding, head, norms and biases keep their type."""
    return name.endswith("_proj.weight")


def largest_of_rows(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows 1"]:
    return matrix.abs().amax(dim=1, keepdim=True).float()


def rounded_rows(matrix: Float[Tensor, "rows columns"], largest: Float[Tensor, "rows 1"]) -> Float[Tensor, "rows columns"]:
    """What an engine computes with in the place of `matrix`, in float32. largest: each whole row's largest absolute value."""
    # Tensors and no Python numbers: dividing by a number is multiplying by its inverse, which may round another way.
    limit = torch.tensor(LARGEST, device=matrix.device)
    scale = (largest / limit).clamp_min(1 / (limit * 512))
    return dequantized((matrix / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale)


def dequantized(values: Float[Tensor, "rows columns"], scale: Float[Tensor, "rows 1"]) -> Float[Tensor, "rows columns"]:
    return values.float() * scale
