"""Hugging Face's own models as the judge: log-probs and gradients of samples, each sequence run alone.

May import: megatron_nsr.types, transformers, torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_nsr.types import WeightedSample


def write_random_weights(folder: Path, dtype: torch.dtype) -> None:
    """Weights of which every one matters: norms and biases are random too."""
    config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)


def load(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True)
    return model.to(device).eval()


def logprobs_and_entropy(model: Any, samples: Sequence[WeightedSample], *, as_one_sequence: bool = False) -> tuple[Tensor, Tensor]:
    """([response tokens], [response tokens]) sample after sample, in fp32, with gradients where they are on.

    as_one_sequence: as a program would get them that ignores where packed sequences begin.
    """
    device = next(model.parameters()).device
    sequences = [torch.tensor([*s.trajectory.prompt_ids, *s.trajectory.response_ids.tolist()], device=device) for s in samples]
    if as_one_sequence:
        lengths = [len(sequence) - 1 for sequence in sequences]
        rows = model(torch.cat([sequence[:-1] for sequence in sequences])[None]).logits[0].float().split(lengths)
    else:
        rows = [model(sequence[None, :-1]).logits[0].float() for sequence in sequences]
    logprobs, entropies = [], []
    for sample, sequence, logits in zip(samples, sequences, rows, strict=True):
        start = len(sample.trajectory.prompt_ids)
        log_p = torch.log_softmax(logits[start - 1 :], -1)
        logprobs.append(log_p.gather(1, sequence[start:, None])[:, 0])
        entropies.append(-(log_p.exp() * log_p).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


def gradients(
    model: Any, samples: Sequence[WeightedSample], entropy_coefficient: float, *, positive_only: bool = False
) -> dict[str, Tensor]:
    """By parameter name, fp32 on the device: of the on-policy signed loss with its entropy bonus. positive_only: a known fault."""
    model.zero_grad()
    logprobs, entropy = logprobs_and_entropy(model, samples)
    lengths = torch.tensor([s.trajectory.length for s in samples])
    weights, scale = (torch.tensor(column).repeat_interleave(lengths).to(logprobs) for column in zip(*map(_numbers, samples), strict=True))
    if positive_only:
        weights = weights.clamp(min=0.0)
    ratio = (logprobs - logprobs.detach()).exp()
    (scale * (-weights * ratio - entropy_coefficient * entropy)).sum().backward()
    return {name: parameter.grad.detach().float().clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def _numbers(sample: WeightedSample) -> tuple[float, float]:
    return sample.weight, sample.scale
