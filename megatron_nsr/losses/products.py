"""The head's three matrix products over a shard of the vocabulary, accumulated in fp32 (float64 for float64 inputs).

May import: torch.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

FP8 = torch.float8_e4m3fn
_FP8_MULTIPLE = 16  # both sides of an FP8 weight, for cuBLAS


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class HeadWeight:
    """The real rows of the LM head [columns, hidden], made ready once for the products of all chunks.

    fp8: the logits' product alone takes both sides rounded to e4m3, each with one scale; gradients use the weight as it is.
    """

    def __init__(self, rows: Float[Tensor, "columns hidden"], *, fp8: bool = False) -> None:
        self.rows = rows.detach()
        # No CPU product gives fp32 from bf16 sides: there the sides are copied to fp32.
        self.upcast = rows.dtype not in (torch.float32, torch.float64) and not rows.is_cuda
        self._weight = self.rows.float() if self.upcast else self.rows
        self._fp8 = _to_fp8(_padded(self.rows)) if fp8 else None

    def logits(
        self, hidden: Float[Tensor, "rows hidden"], out: Float[Tensor, "rows columns"] | None = None
    ) -> Float[Tensor, "rows columns"]:
        """hidden @ weight.T in fp32, whatever the inputs' dtype is: log-probs are never taken from logits rounded to bf16.

        They are written to `out` where one is given; those of an FP8 product are a tensor of their own.
        """
        if self._fp8 is not None:
            values, scale = self._fp8
            states, states_scale = _to_fp8(hidden)
            product = torch._scaled_mm(states, values.t(), scale_a=states_scale, scale_b=scale, out_dtype=torch.float32)
            return product[:, : len(self.rows)].to(accumulation_dtype(hidden))
        if self.upcast or hidden.dtype in (torch.float32, torch.float64):
            return torch.mm(hidden.to(self._weight.dtype), self._weight.t(), out=out)
        return torch.mm(hidden, self._weight.t(), out_dtype=torch.float32, out=out)

    def d_hidden(self, d_logits: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows hidden"]:
        """This shard's part of the hidden states' gradient, in their dtype."""
        if self.upcast:
            return (d_logits.float() @ self._weight).to(self.rows.dtype)
        return d_logits @ self._weight

    def add_d_weight(
        self, total: Float[Tensor, "columns hidden"], d_logits: Float[Tensor, "rows columns"], hidden: Float[Tensor, "rows hidden"]
    ) -> None:
        """total += d_logits.T @ hidden, in place and in total's fp32 or float64."""
        if self.upcast or total.dtype == hidden.dtype:
            total.addmm_(d_logits.t().to(total.dtype), hidden.to(total.dtype))
        else:
            torch.addmm(total, d_logits.t(), hidden, out_dtype=total.dtype, out=total)


def _padded(weight: Tensor) -> Tensor:
    return torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % _FP8_MULTIPLE))


def _to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(values in e4m3, their scale): the largest magnitude becomes e4m3's largest."""
    if not x.numel():
        return x.to(FP8), torch.ones((), device=x.device)
    scale = (x.abs().amax().float() / torch.finfo(FP8).max).clamp_min(torch.finfo(torch.float32).tiny)
    return (x.float() / scale).to(FP8), scale
