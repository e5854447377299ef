"""The critic on one rank: where it starts, what it learns, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_nsr.config_files import parse_config
from megatron_nsr.conversion.exporting import export_hf
from megatron_nsr.models.backends import choose_backend
from megatron_nsr.models.hf_config import read_model_shape
from megatron_nsr.objectives.mini_batches import StepBatch
from megatron_nsr.platform import distributed
from megatron_nsr.training.actor import Actor
from megatron_nsr.training.checkpoints import Checkpoints
from megatron_nsr.training.critic import Critic
from megatron_nsr.training.scheduled_model import MicroBatches
from megatron_nsr.training.setup import build_actor, build_critic
from megatron_nsr.types import Trajectory, UserError, WeightedSample
from tests.tiny_models import write_tiny_model

GOOD, BAD, LENGTH = 5, 6, 4


@pytest.fixture(scope="module", params=["qwen3", "qwen3_moe"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied dense model, and a mixture of experts."""
    path = tmp_path_factory.mktemp("model")
    write_tiny_model(path, request.param, tied=request.param == "qwen3", layers=1)
    return path


def actor_and_critic(model: Path, kl_coefficient: float = 0.0, **critic: Any) -> tuple[Actor, Critic]:
    """Both with the weights of `model`."""
    config = parse_config(
        {
            "run": {"dir": "unused", "steps": 1},
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"template": "plain", "prompts_per_step": 1},
            "objective": {"name": "ppo", "mini_batch_prompts": 1, "kl_coefficient": kl_coefficient},
            "critic": critic,
            "training": {"tokens_per_micro_batch": 40},
        }
    )
    distributed.init_process_group()
    shape, backend = read_model_shape(str(model)), choose_backend("cpu")
    actor = build_actor(config, shape, backend)
    return actor, build_critic(config, shape, backend, actor.chunks)


def samples(seed: int, count: int = 12) -> list[WeightedSample]:
    """The outcome is told by the prompt's last token; responses are noise."""
    draw = np.random.default_rng(seed)
    found = []
    for index in range(count):
        good = bool(draw.integers(0, 2))
        ids = draw.integers(10, 40, LENGTH).astype(np.int32)
        prompt = (1, int(draw.integers(10, 40)), GOOD if good else BAD)
        found.append(
            WeightedSample(Trajectory(0, index, prompt, ids, np.zeros(LENGTH, np.float32), "stop", 0), 1.0 if good else -1.0, 1 / 48)
        )
    return found


def prepared(actor: Actor, *mini_batches: Sequence[WeightedSample]) -> tuple[MicroBatches, ...]:
    return actor.prepare(StepBatch(tuple(map(tuple, mini_batches)), ()), 1).mini_batches


def test_it_starts_as_the_policy_s_trunk_with_values_of_zero(model: Path) -> None:
    actor, critic = actor_and_critic(model, whiten_advantages=False)
    policy, copy = (dict(chunk.named_parameters()) for chunk in (actor.chunks[0], critic.chunks[0]))
    assert copy.keys() - {"output_layer.weight"} == policy.keys() - {"output_layer.weight"}
    assert all(torch.equal(copy[name], policy[name]) for name in copy.keys() - {"output_layer.weight"})
    (micro,) = critic.judge(prepared(actor, samples(0, 3)))[0]
    assert micro.old_values is not None and micro.returns is not None and not micro.old_values.any()
    assert copy["output_layer.weight"].shape == (1, 64) and not copy["output_layer.weight"].any()
    outcomes = torch.tensor([one.weight for one in samples(0, 3)]).repeat_interleave(LENGTH)
    for found in (micro.returns, micro.weights):  # without a value to compare with, the advantage is the outcome
        assert torch.equal(found[micro.response_rows], outcomes)


def test_it_learns_to_tell_the_reward_before_it_comes(model: Path) -> None:
    actor, critic = actor_and_critic(model, value_clip=None)
    before = {name: parameter.detach().clone() for name, parameter in actor.chunks[0].named_parameters()}
    for seed in range(25):
        metrics = critic.update(critic.judge(prepared(actor, samples(seed))), 3e-3)
    assert metrics["critic/explained_variance"] > 0.95 and metrics["critic/loss"] < 0.05
    micro, *_ = critic.judge(prepared(actor, samples(99)))[0]
    assert micro.old_values is not None and micro.returns is not None
    assert (micro.old_values - micro.returns)[micro.response_rows].abs().mean() < 0.3
    assert all(torch.equal(parameter, before[name]) for name, parameter in actor.chunks[0].named_parameters())


def test_several_mini_batches_are_as_many_updates_and_their_advantages_are_whitened_together(model: Path) -> None:
    actor, critic = actor_and_critic(model)
    judged = critic.judge(prepared(actor, samples(0, 4), samples(1, 8)))
    advantages = torch.cat([micro.weights[micro.response_rows] for mini in judged for micro in mini])
    assert len(judged) == 2 and len(advantages) == 12 * LENGTH
    assert float(advantages.mean()) == pytest.approx(0, abs=1e-6) and float(advantages.var()) == pytest.approx(1, rel=1e-4)
    metrics = critic.update(judged, 1e-3)
    assert metrics["critic/loss"] > 0 and metrics["critic/grad_norm"] > 0
    assert metrics["critic/value_mean"] == 0 and metrics["critic/explained_variance"] == pytest.approx(0, abs=1e-6)
    assert 0 <= metrics["critic/clip_ratio"] <= 1 and metrics["critic/learning_rate"] == 1e-3


def test_the_policy_s_loss_is_that_of_its_tokens_advantages(model: Path) -> None:
    """On-policy the ratio is 1, so the loss is minus the scaled sum of advantages."""
    actor, critic = actor_and_critic(model, whiten_advantages=False, gamma=0.5)
    step = actor.prepare(StepBatch((tuple(samples(0)),), ()), 1)
    judged = critic.judge(step.mini_batches)
    expected = -sum(float((micro.scale * micro.weights).sum()) for micro in judged[0])
    entropy = 1e-4 * 12 * LENGTH / 48
    metrics = actor.update(replace(step, mini_batches=judged), 0.0)
    assert metrics["policy/loss"] == pytest.approx(expected - entropy * metrics["policy/entropy"], rel=1e-5)


def test_the_distance_to_the_initial_policy_is_taken_from_the_reward_and_not_from_the_loss(model: Path) -> None:
    actor, critic = actor_and_critic(model, kl_coefficient=0.1, whiten_advantages=False)
    batch = StepBatch((tuple(samples(0)),), ())
    actor.update(actor.prepare(batch, 1), 1e-2)  # away from the initial policy
    step = actor.prepare(batch, 2, score=True)
    for micro, judged in zip(step.mini_batches[0], critic.judge(step.mini_batches)[0], strict=True):
        assert micro.old_logprobs is not None and micro.reference_logprobs is not None and judged.returns is not None
        gained = (micro.old_logprobs - micro.reference_logprobs)[micro.response_rows].view(-1, LENGTH)
        outcomes = micro.weights[micro.response_rows].view(-1, LENGTH)
        still_to_pay = gained.flip(1).cumsum(1).flip(1)
        assert gained.abs().max() > 1e-3
        torch.testing.assert_close(judged.returns[judged.response_rows].view(-1, LENGTH), outcomes - 0.1 * still_to_pay)
    assert actor.terms.kl_coefficient == 0.0


def test_equal_outcomes_leave_the_policy_without_advantages_and_no_variance_to_explain(model: Path) -> None:
    actor, critic = actor_and_critic(model)
    wrong = [replace(one, weight=-1.0) for one in samples(0)]
    judged = critic.judge(prepared(actor, wrong))
    assert not any(micro.weights.any() for micro in judged[0])
    metrics = critic.update(judged, 1e-3)
    assert metrics["critic/loss"] == pytest.approx(0.5) and "critic/explained_variance" not in metrics


def test_a_step_without_a_verdict_changes_nothing(model: Path) -> None:
    actor, critic = actor_and_critic(model)
    before = [parameter.detach().clone() for parameter in critic.chunks[0].parameters()]
    judged = critic.judge(prepared(actor, [], []))
    assert judged == () and critic.update(judged, 0.1) == {"critic/learning_rate": 0.1}
    assert all(torch.equal(old, new) for old, new in zip(before, critic.chunks[0].parameters(), strict=True))


def test_a_loss_that_is_no_number_stops_the_run(model: Path) -> None:
    actor, critic = actor_and_critic(model)
    (micro, *rest), *_ = critic.judge(prepared(actor, samples(0)))
    assert micro.returns is not None
    with pytest.raises(FloatingPointError, match="is nan: the update was lost"):
        critic.update([[replace(micro, returns=micro.returns * torch.nan), *rest]], 1e-3)


def test_a_checkpoint_stands_for_its_policy_and_the_critic_in_it_for_no_model(model: Path, tmp_path: Path) -> None:
    actor, critic = actor_and_critic(model)
    critic.update(critic.judge(prepared(actor, samples(0))), 1e-2)
    Checkpoints(tmp_path, keep=1).save(1, {}, actor.wrapped, actor.optimizer, actor.backend, model, critic=critic)
    checkpoint = tmp_path / "step_1"
    export_hf(checkpoint, tmp_path / "exported", 1 << 30)
    again, fresh = actor_and_critic(checkpoint)
    exported, _ = actor_and_critic(tmp_path / "exported")
    policies = [dict(one.chunks[0].named_parameters()) for one in (actor, again, exported)]
    assert all(torch.equal(policies[0][name], policy[name]) for policy in policies[1:] for name in policies[0])
    assert not fresh.chunks[-1].output_layer.weight.any()  # of another run: its critic starts anew
    with pytest.raises(UserError, match=r"step_1.critic: not a checkpoint; give .* RUN/checkpoints/step_N"):
        export_hf(checkpoint / "critic", tmp_path / "values", 1 << 30)


def test_a_checkpoint_that_lost_a_part_of_its_critic_is_refused(model: Path, tmp_path: Path) -> None:
    actor, critic = actor_and_critic(model)
    Checkpoints(tmp_path, keep=1).save(1, {}, actor.wrapped, actor.optimizer, actor.backend, model, critic=critic)
    next((tmp_path / "step_1" / "critic").glob("*.distcp")).unlink()
    with pytest.raises(UserError, match=r"the file critic/\S+\.distcp is missing"):
        Checkpoints(tmp_path, keep=1).load(tmp_path / "step_1", actor.wrapped, actor.optimizer, actor.backend, critic)
