"""Which checkpoints stay, what one is good for, and what is said of one that is damaged."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
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
from megatron_nsr.training.checkpoint_files import read_description
from megatron_nsr.training.checkpoints import Checkpoints, _with_extra_state, _without_extra_state, rng_state, set_rng_state
from megatron_nsr.training.setup import build_actor
from megatron_nsr.types import Trajectory, UserError, WeightedSample
from tests.tiny_models import write_tiny_model


@pytest.mark.parametrize(
    ("keep", "written", "left"),
    [
        (1, 30, [30]),  # 50 is of a future that was given up when `latest` was pointed back
        (2, 30, [25, 30]),
        (3, 50, [25, 30, 50]),
    ],
)
def test_the_newest_up_to_the_one_just_written_stay(tmp_path: Path, keep: int, written: int, left: list[int]) -> None:
    for step in (5, 25, 30, 50):
        (tmp_path / f"step_{step}").mkdir()
    (tmp_path / "step_50.copy").mkdir()  # a user's own
    Checkpoints(tmp_path, keep=keep)._prune(written)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*(f"step_{step}" for step in left), "step_50.copy"])


def test_the_best_stays_until_another_is_better_or_it_was_given_up(tmp_path: Path) -> None:
    checkpoints, best = Checkpoints(tmp_path, keep=1), tmp_path / "best"

    def write(step: int, ranking: list[int]) -> list[str]:
        (tmp_path / f"step_{step}").mkdir()
        checkpoints._prune(step)
        checkpoints.point_best(ranking)
        return sorted(path.name for path in tmp_path.glob("step_*"))

    checkpoints.point_best([])
    assert not best.is_symlink()
    assert write(10, [10]) == ["step_10"] and best.resolve().name == "step_10"
    assert write(20, [10, 20]) == ["step_10", "step_20"] and best.resolve().name == "step_10"
    assert write(30, [30, 10, 20]) == ["step_10", "step_30"] and best.resolve().name == "step_30"
    assert write(40, [20, 30, 10]) == ["step_30", "step_40"]  # 20 is gone: the best of what is left
    assert best.resolve().name == "step_30" and not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    checkpoints.point_best([])  # `latest` was pointed back to before the first evaluation
    assert not best.is_symlink() and write(25, []) == ["step_25"]


def actor_of(path: Path, dtype: str) -> Actor:
    config = parse_config(
        {
            "run": {"dir": "unused", "steps": 1},
            "model": {"path": str(path), "dtype": dtype},
            "data": {"template": "plain", "prompts_per_step": 1},
            "objective": {"name": "reinforce", "mini_batch_prompts": 1},
        }
    )
    distributed.init_process_group()
    return build_actor(config, read_model_shape(str(path)), choose_backend("cpu"))


def restore(checkpoint: Path, actor: Actor) -> None:
    Checkpoints(checkpoint.parent, keep=1).load(checkpoint, actor.wrapped, actor.optimizer, actor.backend)


def weights(actor: Actor) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in actor.chunks[0].named_parameters()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_tiny_model(path, "qwen2", tied=False, layers=1)
    return path


@pytest.fixture(scope="module")
def trained(model: Path) -> Actor:
    """A bf16 actor after one update."""
    actor = actor_of(model, "bfloat16")
    trajectory = Trajectory(0, 0, (1, 2), np.array([5, 6, 7, 8], np.int32), np.zeros(4, np.float32), "stop", 0)
    actor.update(actor.prepare(StepBatch(((WeightedSample(trajectory, -1.0, 0.25),),), ()), 1), 1e-2)
    return actor


@pytest.fixture(scope="module")
def saved(model: Path, trained: Actor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    Checkpoints(directory, keep=1).save(1, {}, trained.wrapped, trained.optimizer, trained.backend, model)
    return directory / "step_1"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_checkpoint_stands_as_the_model(model: Path, trained: Actor, saved: Path, dtype: str) -> None:
    reached, start = weights(trained), weights(actor_of(model, "bfloat16"))
    assert any(not torch.equal(tensor, start[name]) for name, tensor in reached.items())
    for name, tensor in weights(actor_of(saved, dtype)).items():
        assert str(tensor.dtype) == f"torch.{dtype}" and torch.equal(tensor, reached[name].to(tensor.dtype)), name


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path, saved: Path) -> None:
    shutil.copytree(saved, tmp_path / "step_1")
    description = json.loads((saved / "run.json").read_text())
    del description["format"]  # as the first one was written
    (tmp_path / "step_1" / "run.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=rf"checkpoint {tmp_path / 'step_1'}: its format is 1, and this version .* reads 2; go on with"):
        read_description(tmp_path / "step_1")


def wipe(pattern: str) -> Callable[[Path, Actor], None]:
    def damage(checkpoint: Path, _: Actor) -> None:
        for file in (checkpoint / "state").glob(pattern):
            file.write_bytes(bytes(file.stat().st_size))

    return damage


def flip_a_bit_of_a_weight(checkpoint: Path, trained: Actor) -> None:
    sought = trained.chunks[0].decoder.layers[0].mlp.linear_fc2.weight.detach().view(torch.int16).numpy().tobytes()
    (file,) = [file for file in (checkpoint / "state").glob("*.distcp") if sought in file.read_bytes()]
    content = bytearray(file.read_bytes())
    content[content.index(sought) + 100] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (wipe("*.distcp"), ""),
        (wipe(".metadata"), ""),
        (wipe("common.pt"), ""),
        (wipe("metadata.json"), ""),
        (flip_a_bit_of_a_weight, "the optimizer's main weights are not the model's"),
    ],
    ids=["data", "metadata", "common", "kind", "one bit"],
)
def test_damage_that_keeps_the_size_is_named(
    model: Path, trained: Actor, saved: Path, tmp_path: Path, damage: Callable[[Path, Actor], None], said: str
) -> None:
    shutil.copytree(saved, tmp_path / "step_1")
    damage(tmp_path / "step_1", trained)
    actor = actor_of(model, "bfloat16")
    with pytest.raises(UserError, match=rf"^checkpoint {tmp_path / 'step_1' / 'state'}: cannot be read \(\w+: {said}.*restore it from"):
        restore(tmp_path / "step_1", actor)


def test_a_checkpoint_before_the_first_update_is_restored(model: Path, trained: Actor, saved: Path, tmp_path: Path) -> None:
    fresh = actor_of(model, "bfloat16")
    Checkpoints(tmp_path, keep=1).save(0, {}, fresh.wrapped, fresh.optimizer, fresh.backend, model)
    actor = actor_of(saved, "bfloat16")
    restore(tmp_path / "step_0", actor)
    start = weights(fresh)
    assert all(torch.equal(tensor, start[name]) for name, tensor in weights(actor).items())


class Scaled(torch.nn.Linear):
    """Keeps scales as Transformer Engine's layers do under FP8."""

    scales = "its own"

    def get_extra_state(self) -> str:
        return self.scales

    def set_extra_state(self, state: str | None) -> None:
        self.scales = self.scales if state is None else state


def test_scales_of_fp8_are_neither_written_nor_lost() -> None:
    layer = torch.nn.ModuleDict({"fc1": Scaled(2, 2)})
    weights = {"fc1.weight": torch.ones(2, 2), "fc1.bias": torch.zeros(2)}
    assert _without_extra_state({**weights, "fc1._extra_state": "others", "fc1._extra_state1": "an expert's"}) == weights
    layer.load_state_dict(_with_extra_state(weights, layer))
    assert layer["fc1"].scales == "its own" and torch.equal(layer["fc1"].weight, torch.ones(2, 2))


def test_generators_of_a_run_on_gpus_are_left_alone(trained: Actor) -> None:
    torch.manual_seed(5)
    state = rng_state() | {
        "cuda": torch.zeros(16, dtype=torch.uint8),
        "megatron": {"model-parallel-rng": torch.zeros(16, dtype=torch.uint8)},
    }
    torch.manual_seed(6)
    before = rng_state()
    set_rng_state(state)
    assert torch.equal(rng_state()["torch"], before["torch"]) and rng_state()["megatron"].keys() == before["megatron"].keys()


def test_a_save_that_cannot_write_leaves_the_older_checkpoint(model: Path, tmp_path: Path) -> None:
    actor = actor_of(model, "bfloat16")

    def save(step: int) -> None:
        Checkpoints(tmp_path, keep=1).save(step, {}, actor.wrapped, actor.optimizer, actor.backend, model)

    save(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))  # enough for the generators, too little for the weights
    try:
        with pytest.raises(OSError, match=rf"checkpoint {tmp_path}/.partial-step_2/state: cannot be written, with \d+ MiB free there"):
            save(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_description(tmp_path / "latest")["step"] == 1
    save(2)
    assert read_description(tmp_path / "latest")["step"] == 2 and sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_2"]
