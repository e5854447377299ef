"""How the kernels over rows of logits are launched, and which logits they take.

May import: torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Without fusion every operation rounds on its own, as in torch. A product with the temperature fused into the subtraction of the
# maximum would round the largest logit differently from that maximum, and a likely token's log-prob could come out above 0.
LAUNCH: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": False}


def check_logits(logits: Tensor) -> None:
    """Raises TypeError or ValueError on logits that the kernels cannot read."""
    if logits.dtype != torch.float32:
        raise TypeError(f"the Triton kernels take float32 logits, not {logits.dtype}: use the head with kernels='torch'")
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"the columns of logits must be contiguous, not {logits.stride(1)} elements apart")
