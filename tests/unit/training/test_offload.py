"""The training state off the device: what is freed, that nothing changes by it, and that nobody reads what is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from megatron_nsr.models.backends import choose_backend
from megatron_nsr.models.critic import CriticModel
from megatron_nsr.models.hf_config import read_model_shape
from megatron_nsr.training.actor import Actor
from megatron_nsr.training.checkpoints import Checkpoints, load_state
from megatron_nsr.training.offload import Offload, optimizer_tensors
from megatron_nsr.training.setup import build_critic
from megatron_nsr.weights.gathering import gather_hf_tensors
from tests.tiny_models import write_tiny_model
from tests.unit.training.test_actor import SAMPLES, actor_of, config_of, steps, weights

KINDS = [("float32", False), ("float32", True), ("bfloat16", False), ("bfloat16", True)]
Level = Literal["none", "optimizer", "all"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_tiny_model(path, "qwen3", tied=False, layers=2)
    return path


def live_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of the memory behind the tensors, counted once where they share it."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def parts(actor: Actor) -> dict[str, int]:
    parameters = [parameter for chunk in actor.chunks for parameter in chunk.parameters()]
    return {
        "parameters": live_bytes(parameters),
        "gradients": live_bytes(parameter.main_grad for parameter in parameters),
        "optimizer": live_bytes(optimizer_tensors(actor)),
    }


def trained(model: Path, level: Level, dtype: str, distributed_optimizer: bool) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Three steps, everything that may leave being away before each of them."""
    actor = actor_of(model, dtype=dtype, distributed_optimizer=distributed_optimizer)
    offload, metrics = Offload([actor], level), []
    for step in range(3):
        offload.take_away()
        offload.bring_all()
        metrics.append(steps(actor, SAMPLES[:4], SAMPLES[4:], step=step))
        offload.bring_weights()
    offload.bring_all()
    return metrics, weights(actor)


@pytest.mark.parametrize(("dtype", "distributed_optimizer"), KINDS)
def test_training_is_the_same_bit_for_bit(model: Path, dtype: str, distributed_optimizer: bool) -> None:
    metrics, trained_weights = trained(model, "none", dtype, distributed_optimizer)
    assert metrics[0]["policy/grad_norm"] > 0 and metrics[0] != metrics[2]
    levels: tuple[Level, ...] = ("optimizer", "all")
    for level in levels:
        others, other_weights = trained(model, level, dtype, distributed_optimizer)
        assert others == metrics
        assert all(torch.equal(other_weights[name], tensor) for name, tensor in trained_weights.items())


@pytest.mark.parametrize(("dtype", "distributed_optimizer"), KINDS)
def test_what_leaves_is_free_and_what_stays_is_there(model: Path, dtype: str, distributed_optimizer: bool) -> None:
    actor = actor_of(model, dtype=dtype, distributed_optimizer=distributed_optimizer)
    steps(actor, SAMPLES)
    whole, count = parts(actor), sum(parameter.numel() for parameter in actor.chunks[0].parameters())
    assert whole["gradients"] >= 4 * count
    assert whole["optimizer"] >= (8 if dtype == "float32" else 12) * count  # two moments, and main weights where the model's are not
    for level, parameters in (("optimizer", whole["parameters"]), ("all", 0)):
        offload = Offload([actor], level)
        offload.take_away()
        assert parts(actor) == {"parameters": parameters, "gradients": 0, "optimizer": 0}
        offload.bring_weights()
        assert parts(actor) == {"parameters": whole["parameters"], "gradients": 0, "optimizer": 0}
        offload.bring_all()
        assert parts(actor) == whole
        assert not any(parameter.main_grad.count_nonzero() for parameter in actor.chunks[0].parameters())
    Offload([actor], "none").take_away()
    assert parts(actor) == whole


def test_fp8_copies_of_the_weights_are_freed_with_the_gradients(model: Path) -> None:
    """As Transformer Engine's layers keep them."""
    actor = actor_of(model)
    layers = [module for module in actor.chunks[0].modules() if hasattr(module, "weight")]
    for layer in layers:
        layer._fp8_workspaces = {"weight": layer.weight.detach().clone()}
    Offload([actor], "none").take_away()
    assert all(layer._fp8_workspaces for layer in layers)
    Offload([actor], "optimizer").take_away()
    assert layers and not any(layer._fp8_workspaces for layer in layers)


def test_the_critic_leaves_with_the_policy(model: Path) -> None:
    actor, config, shape = actor_of(model), config_of(model), read_model_shape(str(model))
    critic = build_critic(config, shape, choose_backend("cpu"), actor.chunks)
    assert isinstance(critic.chunks[0], CriticModel)
    offload = Offload([actor, critic], "all")
    before = weights(critic)
    offload.take_away()
    assert live_bytes(critic.chunks[0].parameters()) == 0
    offload.bring_all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(critic).items())


def test_a_model_without_optimizer_leaves_too(model: Path) -> None:
    actor = actor_of(model, training=False)
    offload, before = Offload([actor], "all"), weights(actor)
    offload.take_away()
    assert live_bytes(actor.chunks[0].parameters()) == 0
    offload.bring_all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(actor).items())


@pytest.fixture
def uses(model: Path, tmp_path: Path) -> tuple[Actor, dict[str, Callable[[], Any]]]:
    actor, backend, shape = actor_of(model, dtype="bfloat16"), choose_backend("cpu"), read_model_shape(str(model))
    checkpoints = Checkpoints(tmp_path, keep=2)
    steps(actor, SAMPLES)
    checkpoints.save(1, {}, actor.wrapped, actor.optimizer, backend, model)
    return actor, {
        "measuring": lambda: actor.measure_samples([one.trajectory for one in SAMPLES]),
        "push": lambda: list(gather_hf_tensors(actor.chunks, shape, 1 << 16)),
        "update": lambda: steps(actor, SAMPLES),
        "checkpoint": lambda: checkpoints.save(2, {}, actor.wrapped, actor.optimizer, backend, model),
        "resume": lambda: load_state(tmp_path / "step_1" / "state", actor.wrapped, actor.optimizer, backend),
    }


def test_what_is_not_on_the_device_is_refused_by_name(uses: tuple[Actor, dict[str, Callable[[], Any]]]) -> None:
    actor, calls = uses
    offload = Offload([actor], "all")
    offload.take_away()
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=r"the model's weights are not on the device|gradient buffers are not on the device"):
            call()
        assert name
    offload.bring_weights()
    for name in ("update", "checkpoint", "resume"):
        with pytest.raises(RuntimeError, match=r"(gradient buffers|main weights and moments) are not on the device"):
            calls[name]()
    for name in ("measuring", "push"):
        calls[name]()
    offload.bring_all()
    for call in calls.values():
        call()
