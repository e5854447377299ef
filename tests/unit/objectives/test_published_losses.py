"""The loss of a whole step by each objective's published formula, written out in float64, against weights, scales and head terms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_nsr.config import Config
from megatron_nsr.config_files import parse_config
from megatron_nsr.losses.terms import TokenInputs, regularized, token_terms
from megatron_nsr.objectives.mini_batches import build_step_batch
from megatron_nsr.objectives.objective import OwnLoss
from megatron_nsr.objectives.registry import build_objective
from megatron_nsr.training.packing import pack
from megatron_nsr.training.setup import loss_terms
from megatron_nsr.types import Outcome, Reason, Trajectory, Verdict, WeightedSample

VERDICTS = {"+": Verdict(Outcome.CORRECT, Reason.MATCH), "-": Verdict(Outcome.WRONG, Reason.MISMATCH)}
TIMEOUT = Verdict(Outcome.NONE, Reason.TIMEOUT)
# All correct, all wrong, mixed with a timeout, one judged of either sign, nothing judged, mixed.
EDGES = ["++++", "----", "+-0-", "0+00", "000-", "0000", "+--+"]
BUDGET, ENTROPY, KL = 12, 0.02, 0.03


class Response:
    """One response in float64: reward or None, and per token what the engine, the old, the present and the reference policy say."""

    def __init__(self, draw: np.random.Generator, mark: str) -> None:
        self.mark, self.reward = mark, {"+": 1.0, "-": -1.0}.get(mark)
        length = int(draw.integers(1, BUDGET + 1))
        self.new = np.float32(-draw.random(length) - 0.5).astype(np.float64)
        drift = draw.normal(0, 0.3, (3, length)).astype(np.float32)
        self.engine, self.old, self.reference = (np.float32(self.new + d).astype(np.float64) for d in drift)
        self.entropy = draw.random(length).astype(np.float32).astype(np.float64)


def responses(groups: list[str], seed: int) -> list[list[Response]]:
    draw = np.random.default_rng(seed)
    return [[Response(draw, mark) for mark in group] for group in groups]


def clipped(response: Response, advantage: float, low: float = 0.2, high: float = 0.2) -> np.ndarray:
    ratio = np.exp(response.new - response.old)
    return -np.minimum(ratio * advantage, np.clip(ratio, 1 - low, 1 + high) * advantage)


def judged(group: list[Response]) -> list[Response]:
    return [response for response in group if response.reward is not None]


def signed(positive: float, negative: float) -> Callable[[list[Response], Response], float]:
    return lambda group, response: positive if response.reward == 1 else -negative


def grpo(group: list[Response], response: Response) -> float:
    rewards = [r.reward for r in judged(group)]
    return 0.0 if len(set(rewards)) < 2 else (response.reward - np.mean(rewards)) / np.std(rewards, ddof=1)


def dr_grpo(group: list[Response], response: Response) -> float:
    return response.reward - float(np.mean([r.reward for r in judged(group)]))


def rloo(group: list[Response], response: Response) -> float:
    others = [r.reward for r in judged(group) if r is not response]
    return response.reward - float(np.mean(others)) if others else 0.0


def topr(response: Response, advantage: float) -> np.ndarray:
    ratio = math.exp(float(np.sum(response.new - response.engine)))
    return -advantage * (1.0 if advantage > 0 else min(1.0, ratio)) * response.new


def reinforce(response: Response, advantage: float) -> np.ndarray:
    return -advantage * response.new


def clip_higher(response: Response, advantage: float) -> np.ndarray:
    return clipped(response, advantage, 0.2, 0.28)


# name: (advantage of a response in its group, loss of its tokens, aggregation, signs whose tokens carry entropy bonus and KL)
FORMULAS: dict[str, tuple[Callable[..., float], Callable[..., np.ndarray], str, str]] = {
    "psr": (signed(1, 0), clipped, "sequence_mean", "+"),
    "nsr": (signed(0, 1), clipped, "sequence_mean", "-"),
    "w_reinforce": (signed(0.1, 1), clipped, "sequence_mean", "+-"),
    "reinforce": (signed(1, 1), clipped, "sequence_mean", "+-"),
    "grpo": (grpo, clipped, "sequence_mean", "+-"),
    "dr_grpo": (dr_grpo, clipped, "budget_mean", "+-"),
    "dapo": (grpo, clip_higher, "token_mean", "+-"),
    "rloo": (rloo, reinforce, "budget_mean", "+-"),
    "topr": (signed(1, 1), topr, "budget_mean", "+-"),
}


def by_formula(name: str, groups: list[list[Response]]) -> float:
    advantage_of, loss_of, aggregation, carriers = FORMULAS[name]
    counted = [response for group in groups for response in judged(group)]
    total = 0.0
    for group in groups:
        for response in judged(group):
            losses = loss_of(response, advantage_of(group, response))
            if response.mark in carriers:
                distance = response.reference - response.new
                losses = losses - ENTROPY * response.entropy + KL * (np.exp(distance) - distance - 1)
            tokens = {"sequence_mean": len(response.new), "budget_mean": BUDGET, "token_mean": None}[aggregation]
            total += losses.sum() / (tokens * len(counted) if tokens else sum(len(r.new) for r in counted))
    return total


def config_of(name: str) -> Config:
    return parse_config(
        {
            "run": {"dir": "unused", "steps": 1},
            "model": {"path": "unused"},
            "data": {"template": "plain", "prompts_per_step": 8},
            "rollout": {"max_response_tokens": BUDGET},
            "objective": {"name": name, "mini_batch_prompts": 8, "entropy_coefficient": ENTROPY, "kl_coefficient": KL},
        }
    )


def by_the_parts(name: str, groups: list[list[Response]]) -> tuple[float, int]:
    """(loss of the step's one mini-batch, samples kept), with the settings that come with the objective's name."""
    config = config_of(name)
    settings, objective = config.objective, build_objective(name, lambda_=config.objective.lambda_)
    flat = [response for group in groups for response in group]
    trajectories = [
        Trajectory(i, i, (1, 2), np.zeros(len(r.new), np.int32), r.engine.astype(np.float32), "stop", 0) for i, r in enumerate(flat)
    ]
    batch = build_step_batch(
        trajectories,
        [VERDICTS.get(response.mark, TIMEOUT) for response in flat],
        objective,
        samples_per_prompt=len(groups[0]),
        mini_batch_prompts=len(groups),
        aggregation=settings.aggregation,
        normalization=settings.normalization,
        token_budget=config.rollout.max_response_tokens,
    )
    (kept,) = batch.mini_batches
    packed = pack(kept, token_multiple=4)

    def placed(field: str) -> torch.Tensor:
        values = torch.zeros(len(packed.targets), dtype=torch.float64)
        rows = [getattr(flat[sample.trajectory.sample], field) for sample in kept]
        return values.index_copy(0, packed.response_rows, torch.from_numpy(np.concatenate([*rows, np.zeros(0)])))

    new, entropy, old, reference = (placed(field) for field in ("new", "entropy", "old", "reference"))
    packed, terms = replace(packed, old_logprobs=old, reference_logprobs=reference), loss_terms(settings)
    if isinstance(objective, OwnLoss):
        losses = packed.scale * regularized(objective.token_loss(new, entropy, packed), new, entropy, reference, terms)
    else:
        losses = token_terms(new, entropy, TokenInputs(packed.weights, packed.scale, old, reference), terms).loss
    return float(losses.sum()), len(kept)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FORMULAS)
def test_a_step_s_loss_is_the_published_one(name: str, seed: int) -> None:
    groups = responses(EDGES, seed)
    assert by_the_parts(name, groups)[0] == pytest.approx(by_formula(name, groups), rel=2e-6)


@pytest.mark.parametrize("group", ["+", "-", "0", "++++", "----", "0000", "+000", "-000", "+-"])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_group_at_the_edge_alone(name: str, group: str) -> None:
    groups = responses([group], 5)
    loss, kept = by_the_parts(name, groups)
    assert loss == pytest.approx(by_formula(name, groups), rel=2e-6)
    assert kept == sum(mark in FORMULAS[name][3] for mark in group)


def test_the_gradients_of_psr_and_nsr_add_up_to_that_of_reinforce() -> None:
    """Of the formulas themselves; tests/distributed/test_training.py has it of the model's gradients."""
    for seed in range(5):
        groups = responses(EDGES, seed)
        psr, nsr, both = (by_the_parts(name, groups)[0] for name in ("psr", "nsr", "reinforce"))
        assert psr + nsr == pytest.approx(both, rel=2e-6)


@pytest.mark.parametrize("ranges", [((1.0, 1.0), (0.0, 1.0)), ((0.5, 2.0), (0.25, 3.0))])
def test_topr_truncates_each_sign_s_ratio_in_its_own_range(ranges: tuple[tuple[float, float], tuple[float, float]]) -> None:
    own = build_objective("topr", positive_ratio=ranges[0], negative_ratio=ranges[1])
    assert isinstance(own, OwnLoss)
    draw = np.random.default_rng(1)
    for mark, weight in (("+", 1.0), ("-", -1.0)):
        response = Response(draw, mark)
        for ratio in (1e-3, 0.4, 0.8, 1.3, 2.5, 1e4):
            engine = response.new - math.log(ratio) / len(response.new)
            trajectory = Trajectory(0, 0, (1, 2), np.zeros(len(engine), np.int32), engine.astype(np.float32), "stop", 0)
            batch = pack([WeightedSample(trajectory, weight, 1.0)], token_multiple=8)
            logprobs = torch.zeros(len(batch.targets), dtype=torch.float64)
            logprobs = logprobs.index_copy(0, batch.response_rows, torch.from_numpy(response.new)).requires_grad_()
            own.token_loss(logprobs, torch.zeros_like(logprobs), batch).sum().backward()
            low, high = ranges[0 if weight > 0 else 1]
            expected = torch.where(batch.response_mask, -weight * min(max(ratio, low), high), 0.0).double()
            torch.testing.assert_close(logprobs.grad, expected, rtol=1e-5, atol=0)
