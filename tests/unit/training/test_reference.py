"""The reference policy: its log-probs, what it leaves alone, its KL in loss and metrics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_nsr.losses.terms import k3
from megatron_nsr.objectives.mini_batches import StepBatch
from megatron_nsr.training.actor import Actor, PreparedStep
from megatron_nsr.training.reference import ReferenceWeights
from megatron_nsr.types import WeightedSample
from tests.tiny_models import write_tiny_model
from tests.unit.training.test_actor import SAMPLES, actor_of, sample, steps, weights

DROPPED = tuple(sample(seed, 1.0).trajectory for seed in range(20, 26))


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_tiny_model(path, "qwen3", tied=request.param, layers=1)
    return path


def prepared(actor: Actor, *mini_batches: list[WeightedSample]) -> PreparedStep:
    return actor.prepare(StepBatch(tuple(tuple(samples) for samples in mini_batches), DROPPED), 1)


def column(step: PreparedStep, field: str) -> torch.Tensor:
    """A tensor of the micro-batches, at response tokens."""
    return torch.cat([getattr(micro, field)[micro.response_mask] for mini in step.mini_batches for micro in mini])


def test_without_a_coefficient_nothing_is_kept_and_nothing_measured(model: Path) -> None:
    actor = actor_of(model)
    assert actor.reference is None
    assert all(micro.reference_logprobs is None for mini in prepared(actor, SAMPLES).mini_batches for micro in mini)
    assert "policy/kl_reference" not in steps(actor, SAMPLES)


def test_its_log_probs_stay_those_of_the_initial_weights(model: Path) -> None:
    actor = actor_of(model, kl_coefficient=0.1)
    first = prepared(actor, SAMPLES[:4], SAMPLES[4:])
    assert torch.equal(column(first, "reference_logprobs"), column(first, "old_logprobs"))  # at first it is the policy
    steps(actor, SAMPLES)
    second = prepared(actor, SAMPLES[:4], SAMPLES[4:])
    assert torch.equal(column(second, "reference_logprobs"), column(first, "reference_logprobs"))
    assert not torch.equal(column(second, "old_logprobs"), column(first, "old_logprobs"))


def test_measuring_it_leaves_policy_and_optimizer_alone(model: Path) -> None:
    actor = actor_of(model, kl_coefficient=0.1)
    steps(actor, SAMPLES)
    before, main = weights(actor), [p.detach().clone() for group in actor.optimizer.param_groups for p in group["params"]]
    prepared(actor, SAMPLES)
    after, left = weights(actor), [p.detach() for group in actor.optimizer.param_groups for p in group["params"]]
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(x, y) for x, y in zip(main, left, strict=True))


def test_an_error_inside_brings_the_policy_back() -> None:
    module = torch.nn.Linear(3, 2)
    reference, moved = ReferenceWeights([module]), torch.full((2, 3), 5.0)
    start = module.weight.detach().clone()
    module.weight.data.copy_(moved)
    with pytest.raises(RuntimeError, match="lost"), reference.in_model():
        assert torch.equal(module.weight, start)
        raise RuntimeError("lost")
    assert torch.equal(module.weight, moved)
    with reference.in_model():
        assert torch.equal(module.weight, start)


@pytest.mark.parametrize("mini_batches", [[SAMPLES], [SAMPLES[:4], SAMPLES[4:]]], ids=["on_policy", "two_mini_batches"])
def test_the_metric_is_the_mean_k3_before_the_update(model: Path, mini_batches: list[list[WeightedSample]]) -> None:
    actor = actor_of(model, kl_coefficient=0.1, dropped_share=0.0)
    assert steps(actor, SAMPLES)["policy/kl_reference"] == 0.0
    scored = prepared(actor, SAMPLES[:4], SAMPLES[4:])
    expected = float(k3(column(scored, "old_logprobs"), column(scored, "reference_logprobs")).mean())
    metrics = steps(actor, *mini_batches)
    assert metrics["policy/kl_reference"] == pytest.approx(expected, rel=1e-5) and expected > 1e-3


def test_dropped_samples_count_in_the_metric(model: Path) -> None:
    actor = actor_of(model, kl_coefficient=0.1, dropped_share=1.0)
    steps(actor, SAMPLES)
    nothing_kept = actor.update(actor.prepare(StepBatch(((),), DROPPED), 1), 0.0)
    assert nothing_kept["policy/kl_reference"] > 1e-3 and nothing_kept["policy/updates"] == 0


def test_the_losses_of_the_signs_leave_it_out_and_the_whole_loss_has_it(model: Path) -> None:
    """Samples of weight 0 carry it too, here beside an entropy bonus of 0."""
    actor = actor_of(model, kl_coefficient=0.3, entropy_coefficient=0.0)
    steps(actor, SAMPLES)
    neutral = [WeightedSample(one.trajectory, 0.0, one.scale) for one in SAMPLES[:3]]
    metrics = steps(actor, [*SAMPLES[3:], *neutral])
    signed = sum(-one.weight * one.scale * one.trajectory.length for one in SAMPLES[3:])  # on-policy the ratio is 1
    assert metrics["policy/loss_psr"] + metrics["policy/loss_nsr"] == pytest.approx(signed, rel=1e-4)
    scale, tokens = SAMPLES[0].scale, sum(one.trajectory.length for one in SAMPLES)
    kl = 0.3 * scale * tokens * metrics["policy/kl_reference"]
    assert metrics["policy/loss"] - signed == pytest.approx(kl, rel=1e-3) and kl > 1e-4


def test_alone_it_leads_back_to_the_initial_policy(model: Path) -> None:
    actor = actor_of(model, kl_coefficient=1.0, entropy_coefficient=0.0)
    steps(actor, SAMPLES)
    neutral = [WeightedSample(one.trajectory, 0.0, one.scale) for one in SAMPLES]
    distances = [actor.update(actor.prepare(StepBatch((tuple(neutral),), ()), 1), 1e-3)["policy/kl_reference"] for _ in range(8)]
    assert distances[-1] < 0.5 * distances[0]
