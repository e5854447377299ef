"""The optimizer that a run gets: what is decayed, what is clipped, and what happens to numbers that are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_nsr.config_files import parse_config
from megatron_nsr.models.backends import choose_backend
from megatron_nsr.models.hf_config import read_model_shape
from megatron_nsr.objectives.mini_batches import StepBatch
from megatron_nsr.platform import distributed
from megatron_nsr.training.actor import Actor
from megatron_nsr.training.setup import build_actor
from megatron_nsr.types import Trajectory, WeightedSample
from tests.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_tiny_model(path, "qwen2", tied=False, layers=1)
    return path


def actor_of(model: Path, **optimizer: float) -> Actor:
    config = parse_config(
        {
            "run": {"dir": "unused", "steps": 1},
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"template": "plain", "prompts_per_step": 1},
            "objective": {"name": "reinforce", "mini_batch_prompts": 1, "entropy_coefficient": 0.0},
            "optimizer": {"learning_rate": 0.1, "weight_decay": 0.5, **optimizer},
        }
    )
    distributed.init_process_group()
    return build_actor(config, read_model_shape(str(model)), choose_backend("cpu"))


def step_of(weight: float, scale: float = 0.25) -> StepBatch:
    trajectory = Trajectory(0, 0, (1, 2), np.array([5, 6, 7, 8], np.int32), np.zeros(4, np.float32), "stop", 0)
    return StepBatch(((WeightedSample(trajectory, weight, scale),),), ())


def update(actor: Actor, weight: float, learning_rate: float = 0.1, scale: float = 0.25) -> dict[str, float]:
    return actor.update(actor.prepare(step_of(weight, scale), 1), learning_rate)


def parameters(actor: Actor) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in actor.chunks[0].named_parameters()}


def test_decay_is_decoupled_and_spares_biases_and_norms(model: Path) -> None:
    actor = actor_of(model)
    before = parameters(actor)
    metrics = update(actor, weight=0.0)  # no gradient at all: only decay can move a weight
    assert metrics["policy/grad_norm"] == 0.0
    for name, after in parameters(actor).items():
        spared = name.endswith("bias") or "norm" in name
        torch.testing.assert_close(after, before[name] * (1.0 if spared else 1 - 0.1 * 0.5), msg=name)
    assert any(name.endswith("linear_qkv.bias") for name in before)


def test_a_large_gradient_is_clipped_to_the_bound(model: Path) -> None:
    norms, moved = [], []
    for bound in (1e-3, 0.0):
        actor = actor_of(model, gradient_clip=bound, eps=1.0, weight_decay=0.0)  # a large eps makes Adam's step follow the gradient's size
        before = parameters(actor)
        norms.append(update(actor, weight=-1.0)["policy/grad_norm"])
        moved.append(sum(float((after - before[name]).square().sum()) for name, after in parameters(actor).items()) ** 0.5)
    assert norms[0] == pytest.approx(norms[1]) and norms[0] > 1e-2  # the norm before clipping is what is logged
    assert moved[0] == pytest.approx(0.1 * 1e-3, rel=0.05)  # learning rate x clipped norm, as the first moment's bias is corrected
    assert moved[1] > 5 * moved[0]


def test_the_learning_rate_of_the_step_is_the_one_used(model: Path) -> None:
    actor = actor_of(model)
    before = parameters(actor)
    assert update(actor, weight=1.0, learning_rate=0.0)["policy/learning_rate"] == 0.0
    for name, after in parameters(actor).items():
        assert torch.equal(after, before[name]), name


def test_a_gradient_that_is_no_number_stops_the_run(model: Path) -> None:
    actor = actor_of(model)
    with pytest.raises(FloatingPointError, match=r"gradient norm is (nan|inf)"):
        update(actor, weight=1.0, scale=float("inf"))


def test_nothing_left_to_train_on_changes_nothing(model: Path) -> None:
    actor = actor_of(model)
    before = parameters(actor)
    trajectory = step_of(1.0).mini_batches[0][0].trajectory
    metrics = actor.update(actor.prepare(StepBatch(((), ()), (trajectory,)), 1), 0.1)
    assert metrics["policy/updates"] == 0.0 and metrics["policy/entropy"] > 0
    assert all(torch.equal(after, before[name]) for name, after in parameters(actor).items())
