"""Norms of whole gradients and the angle between them, over all ranks. May import: megatron-core's optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

Gradients = list[list[torch.Tensor]]  # a list a chained optimizer


def main_gradients(optimizer: Any) -> Gradients:
    """This rank's part of the reduced gradient, each parameter counted on one rank, as megatron-core counts it for its norm.

    The tensors are the optimizer's own: the next backward pass overwrites them.
    """
    gradients = []
    for part in optimizer.chained_optimizers:
        part.prepare_grads()
        gradients.append([gradient.detach() for gradient in part.get_main_grads_for_grad_norm()])
    return gradients


def copied(gradients: Gradients) -> Gradients:
    return [[gradient.clone() for gradient in part] for part in gradients]


def compare_gradients(optimizer: Any, positive: Gradients, negative: Gradients, device: torch.device) -> dict[str, float]:
    """Norm of each sign's gradient where it has one, and the cosine between them where both have."""
    totals = torch.zeros(3, dtype=torch.float64)
    for part, psr, nsr in zip(optimizer.chained_optimizers, positive, negative, strict=True):
        sums = torch.tensor([_dot(psr, psr), _dot(nsr, nsr), _dot(psr, nsr)], dtype=torch.float64, device=device)
        dist.all_reduce(sums, group=part.get_grad_stats_parallel_group())
        totals += sums.cpu()
    psr_norm, nsr_norm = math.sqrt(totals[0]), math.sqrt(totals[1])
    metrics = {"policy/grad_norm_psr": psr_norm, "policy/grad_norm_nsr": nsr_norm}
    if psr_norm and nsr_norm:
        metrics["policy/grad_cosine"] = float(totals[2]) / (psr_norm * nsr_norm)
    return {name: value for name, value in metrics.items() if value}


def _dot(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
    return sum((float(torch.linalg.vecdot(x.flatten(), y.flatten())) for x, y in zip(a, b, strict=True)), 0.0)
