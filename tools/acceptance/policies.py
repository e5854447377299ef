"""Policies without a run: built from a model's directory, and fed with samples that are made up or drawn from a data file.

May import: megatron_nsr.config, models, training, platform.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_nsr.config import Config
from megatron_nsr.config_files import parse_config
from megatron_nsr.models.backends import Backend, choose_backend
from megatron_nsr.models.hf_config import ModelShape, read_model_shape
from megatron_nsr.platform import distributed
from megatron_nsr.training.actor import Actor, PreparedStep
from megatron_nsr.training.measurements import TokenSums
from megatron_nsr.training.setup import build_actor
from megatron_nsr.types import TrainBatch, Trajectory, UserError, WeightedSample
from tools.acceptance.record import NotRun

ENTROPY = 0.01  # coefficient of the bonus: large enough that a missing one shows in the gradient


def policy_config(path: Path, /, **sections: dict[str, Any]) -> Config:
    """The settings of a policy that is trained on made-up samples; `sections` replace or add keys of each section."""
    values: dict[str, dict[str, Any]] = {
        "run": {"dir": "unused", "steps": 1},
        "model": {"path": str(path)},
        "data": {"template": "plain", "prompts_per_step": 1},
        "objective": {"name": "reinforce", "mini_batch_prompts": 1, "entropy_coefficient": ENTROPY},
        "optimizer": {"gradient_clip": 0.0},  # the gradient is read after the update
        "training": {"tokens_per_micro_batch": 1 << 20},  # whatever is packed is one micro-batch
        "logging": {"sign_norms_every": 0},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return parse_config(values)


def this_backend() -> Backend:
    """The one that `auto` takes. Raises NotRun where a part of it is missing."""
    try:
        return choose_backend("auto")
    except UserError as missing:
        raise NotRun(str(missing)) from None


def build_policy_of(config: Config, backend: Backend | None = None) -> tuple[Actor, ModelShape]:
    """On the backend that `auto` takes, unless another is given. Earlier policies of this process stay usable only to be freed."""
    distributed.init_process_group()
    shape = read_model_shape(config.model.path)
    return build_actor(config, shape, backend or choose_backend(config.model.backend)), shape


def made_up(vocabulary: int, prompt: int, responses: Sequence[int], seed: int) -> list[WeightedSample]:
    """Random tokens; weights +1 and -1 in turn, and each token of all counts the same."""
    draw, total = np.random.default_rng(seed), sum(responses)
    return [
        WeightedSample(
            Trajectory(
                index,
                0,
                tuple(int(token) for token in draw.integers(0, vocabulary, prompt)),
                draw.integers(0, vocabulary, length).astype(np.int32),
                np.zeros(length, np.float32),
                "length",
                0,
            ),
            1.0 if index % 2 == 0 else -1.0,
            1.0 / total,
        )
        for index, length in enumerate(responses)
    ]


def packed(samples: Sequence[WeightedSample], actor: Actor) -> TrainBatch:
    """All samples in one micro-batch, in their order, filled up as the actor's layers need it."""
    (batch,) = actor.pack(samples)
    return batch


def response_logprobs(actor: Actor, batch: TrainBatch) -> Tensor:
    """float64 [response tokens] on the host, sample after sample."""
    return actor.score([batch])[0].logprobs[batch.response_mask].double().cpu()


def update_on(actor: Actor, batches: list[TrainBatch], learning_rate: float) -> dict[str, float]:
    """One optimizer step on these micro-batches."""
    return actor.update(PreparedStep((batches,), TokenSums(), TokenSums(), 0.0), learning_rate)


def free_device_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
