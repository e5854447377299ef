"""The example objective: its weights, its ratio over packed sequences, and that it trains through the head."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from examples.own_objective import EPS_LOW, SequenceRatio
from megatron_nsr.objectives.objective import OwnLoss
from megatron_nsr.training.packing import pack
from megatron_nsr.types import Trajectory, WeightedSample

LENGTHS = (3, 5)


def packed() -> torch.Tensor:
    samples = [
        WeightedSample(Trajectory(0, i, (1, 2), np.arange(n, dtype=np.int32), np.zeros(n, np.float32), "stop", 0), -1.0, 0.5)
        for i, n in enumerate(LENGTHS)
    ]
    return pack(samples, token_multiple=4)


def test_it_keeps_wrong_responses_with_a_verdict() -> None:
    signed = SequenceRatio().weigh(torch.tensor([[1.0, -1.0, -1.0]]), torch.tensor([[True, True, False]]))
    assert signed.weights.tolist() == [[0.0, -1.0, 0.0]] and signed.kept.tolist() == [[False, True, False]]
    assert isinstance(SequenceRatio(), OwnLoss)


def test_every_token_of_a_response_has_the_response_s_ratio() -> None:
    batch = packed()
    shift = torch.where(batch.response_mask, torch.linspace(-1e-4, 2e-4, len(batch.targets)), torch.tensor(9.0))  # 9: prompts do not count
    batch = replace(batch, old_logprobs=torch.zeros_like(shift))
    losses = SequenceRatio().token_loss(shift, torch.zeros_like(shift), batch)
    for start, stop in batch.cu_seqlens.unfold(0, 2, 1).tolist()[: len(LENGTHS)]:
        mask = batch.response_mask[start:stop]
        expected = shift[start:stop][mask].mean().exp()
        assert losses[start:stop][mask].tolist() == pytest.approx([float(expected)] * int(mask.sum()))


def test_a_response_that_became_unlikely_enough_is_let_go() -> None:
    batch = packed()
    logprobs = torch.zeros(len(batch.targets), requires_grad=True)
    batch = replace(batch, old_logprobs=torch.full_like(logprobs, 2 * EPS_LOW).detach())
    SequenceRatio().token_loss(logprobs, torch.zeros(len(logprobs)), batch).sum().backward()
    assert logprobs.grad is not None and not logprobs.grad.any()


def test_on_policy_its_gradient_is_the_mean_over_the_response() -> None:
    batch = packed()
    logprobs = torch.zeros(len(batch.targets), requires_grad=True)
    (SequenceRatio().token_loss(logprobs, torch.zeros(len(logprobs)), batch) * batch.scale).sum().backward()
    expected = torch.where(batch.response_mask, torch.tensor(0.5), torch.tensor(0.0))  # scale x T tokens / T
    torch.testing.assert_close(logprobs.grad, expected)
