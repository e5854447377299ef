"""`torch_rows` as Triton kernels for CUDA: the same three functions, for float32 logits.

May import: the rest of losses. Statistics and gradient walk over the logits' rows, one program a row. With V columns on this shard they
move, a row (for V = 151,936; bytes of a few numbers a row left out):
- statistics: 4 V bytes read, once (607,744);
- d_logits: 4 V read and 4 V written in fp32 (1,215,488), or 2 V in bf16 (911,616).
loss_terms touches no logits. There are no atomics and no shared temporaries, so that the same input gives the same bits.
"""

from __future__ import annotations

from megatron_nsr.losses.triton_gradient import d_logits
from megatron_nsr.losses.triton_loss import loss_terms
from megatron_nsr.losses.triton_statistics import statistics

__all__ = ["d_logits", "loss_terms", "statistics"]
