"""Where the gradient of the LM head's weight is summed: in megatron-core's main_grad where there is one.

May import: losses.products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_nsr.losses.products import accumulation_dtype


class WeightGradient:
    """Sums d_weight [vocab_shard, hidden] in fp32, in `weight.main_grad` (no further buffer) or in a buffer of its own.

    A parameter's main_grad belongs to megatron-core's DistributedDataParallel and holds the sum over micro-batches: each micro-batch
    may add to it once only.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight: Any = weight  # has attributes of megatron-core's
        main_grad = getattr(weight, "main_grad", None)
        self.in_main_grad = main_grad is not None and main_grad.dtype == accumulation_dtype(weight)
        self.total: Tensor = main_grad if self.in_main_grad else torch.zeros_like(weight, dtype=accumulation_dtype(weight))

    def for_autograd(self) -> Tensor | None:
        """What an autograd function returns as the weight's gradient, in its backward pass.

        With main_grad that is a placeholder, and a flag tells the data-parallel wrapper not to add it: its hook must run all the
        same, since with overlapped reduction it announces that the gradient is complete (distributed_data_parallel.py). A weight
        that is also this stage's embedding gets none: autograd would add the placeholder to the embedding's gradient.
        """
        weight, total = self._weight, self.total
        if not self.in_main_grad:
            return total.to(weight.dtype)
        if getattr(weight, "zero_out_wgrad", False):  # set on tied embeddings of a single stage (language_module.py)
            return None
        weight.grad_added_to_main_grad = True
        # Values are never read: main_grad's own memory, seen as the weight's shape and dtype, costs nothing.
        placeholder: Tensor = total.view(-1).view(weight.dtype)[: weight.numel()].view_as(weight)
        return placeholder
