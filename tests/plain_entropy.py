"""Entropy and log-prob as the textbook has them: one sequence at a time through transformers, in float64, nothing packed or sharded."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import torch
import transformers

from megatron_nsr.types import Trajectory


def random_responses(vocab: int, lengths: Sequence[tuple[int, int]], seed: int = 0) -> list[Trajectory]:
    """One trajectory for each (prompt tokens, response tokens)."""
    draw = np.random.default_rng(seed)
    return [
        Trajectory(
            index,
            0,
            tuple(int(i) for i in draw.integers(0, vocab, prompt)),
            draw.integers(0, vocab, response).astype(np.int32),
            -draw.random(response).astype(np.float32),
            "stop",
            0,
        )
        for index, (prompt, response) in enumerate(lengths)
    ]


def plain_entropy(
    model: transformers.PreTrainedModel, trajectories: Sequence[Trajectory], temperature: float, *, before: int = 1
) -> tuple[float, float]:
    """(entropy, log-prob), means over all response tokens, the logits divided by the temperature.

    The token at place t is judged by the distribution that the tokens before it give, which stands at t - 1; another `before` than 1
    is the mistake that a test must find.
    """
    model, entropies, logprobs = deepcopy(model).double(), [], []
    for trajectory in trajectories:
        ids = torch.tensor([*trajectory.prompt_ids, *trajectory.response_ids.tolist()])
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        assert logits.dtype == torch.float64
        for place in range(len(trajectory.prompt_ids), len(ids)):
            log_p = torch.log_softmax(logits[place - before] / temperature, dim=0)
            entropies.append(-float((log_p.exp() * log_p).sum()))
            logprobs.append(float(log_p[ids[place]]))
    return sum(entropies) / len(entropies), sum(logprobs) / len(logprobs)
