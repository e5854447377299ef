"""Held-out entropy is that of a plain computation, sequence by sequence in float64, whatever the packing and the order.

Parallel layouts: tests/distributed/test_training.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import transformers

from megatron_nsr.config_files import parse_config
from megatron_nsr.evaluation.fixed_responses import FixedResponses
from megatron_nsr.models.backends import choose_backend
from megatron_nsr.models.hf_config import read_model_shape
from megatron_nsr.platform import distributed
from megatron_nsr.training.actor import Actor
from megatron_nsr.training.setup import build_actor
from tests.plain_entropy import plain_entropy, random_responses
from tests.tiny_models import write_tiny_model

TEMPERATURE = 0.3
# A response of one token, one longer than most budgets below, and prompts longer than what follows them.
LENGTHS = [(3, 5), (1, 1), (12, 2), (2, 31), (5, 5), (7, 1), (4, 16), (9, 3)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def plain_model(directory: Path) -> transformers.PreTrainedModel:
    return write_tiny_model(directory, "qwen3", tied=True, layers=2)


@pytest.fixture(scope="module")
def actor(directory: Path, plain_model: transformers.PreTrainedModel) -> Actor:
    config = parse_config(
        {
            "run": {"dir": "unused", "steps": 1},
            "model": {"path": str(directory), "dtype": "float32"},
            "data": {"template": "plain", "prompts_per_step": 1},
            "objective": {"name": "nsr", "mini_batch_prompts": 1},
            "rollout": {"temperature": TEMPERATURE},
            "training": {"head_chunk_tokens": 8},
        }
    )
    distributed.init_process_group()
    return build_actor(config, read_model_shape(str(directory)), choose_backend("cpu"), training=False)


@pytest.mark.parametrize("budget", [1, 16, 24, 60, 10_000])
@pytest.mark.parametrize("order", range(3))
def test_neither_packing_nor_order_changes_it(
    actor: Actor, plain_model: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch, budget: int, order: int
) -> None:
    responses = random_responses(101, LENGTHS)
    shuffled = [responses[i] for i in np.random.default_rng(order).permutation(len(responses))]
    monkeypatch.setattr(actor, "budget", budget)
    entropy, logprob = plain_entropy(plain_model, responses, TEMPERATURE)
    got = FixedResponses(tuple(shuffled)).measure(actor)
    assert got == {"heldout/entropy_fixed": pytest.approx(entropy, rel=1e-6), "heldout/logprob_fixed": pytest.approx(logprob, rel=1e-6)}
    assert actor.measure_samples(shuffled)["policy/entropy"] == got["heldout/entropy_fixed"]


def test_a_computation_one_token_off_would_be_found(plain_model: transformers.PreTrainedModel) -> None:
    responses = random_responses(101, LENGTHS)
    right, off = (plain_entropy(plain_model, responses, TEMPERATURE, before=before) for before in (1, 0))
    assert all(abs(a - b) > 1e-3 * abs(a) for a, b in zip(right, off, strict=True))


def test_no_responses_are_no_metric(actor: Actor) -> None:
    assert FixedResponses().measure(actor) == {}
