"""The update as a user's settings ask for it: an objective's own loss, other forms of the loss, whole gradients by sign."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_nsr.config import Config
from megatron_nsr.config_files import parse_config
from megatron_nsr.models.backends import choose_backend
from megatron_nsr.models.hf_config import read_model_shape
from megatron_nsr.objectives.mini_batches import StepBatch
from megatron_nsr.objectives.objective import OwnLoss, SampleWeights
from megatron_nsr.objectives.registry import build_objective
from megatron_nsr.platform import distributed
from megatron_nsr.training.actor import Actor
from megatron_nsr.training.setup import build_actor
from megatron_nsr.types import TrainBatch, Trajectory, WeightedSample
from tests.tiny_models import write_tiny_model

VOCAB = 40


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_tiny_model(path, "qwen3", tied=request.param, layers=1)
    return path


def config_of(
    model: Path,
    *,
    dtype: str = "float32",
    distributed_optimizer: bool = False,
    recompute: str = "none",
    transformer: dict[str, Any] | None = None,
    logging: dict[str, Any] | None = None,
    **objective: Any,
) -> Config:
    return parse_config(
        {
            "run": {"dir": "unused", "steps": 1},
            "model": {"path": str(model), "dtype": dtype, "transformer": transformer or {}},
            "data": {"template": "plain", "prompts_per_step": 1},
            "objective": {"name": "reinforce", "mini_batch_prompts": 1, "entropy_coefficient": 0.01} | objective,
            "parallel": {"distributed_optimizer": distributed_optimizer},
            "training": {"tokens_per_micro_batch": 24, "recompute": recompute},
            "logging": logging or {},
        }
    )


def actor_of(model: Path, own_loss: OwnLoss | None = None, *, training: bool = True, **settings: Any) -> Actor:
    distributed.init_process_group()
    return build_actor(
        config_of(model, **settings), read_model_shape(str(model)), choose_backend("cpu"), own_loss=own_loss, training=training
    )


def sample(seed: int, weight: float) -> WeightedSample:
    draw = np.random.default_rng(seed)
    ids = draw.integers(0, VOCAB, int(draw.integers(2, 9))).astype(np.int32)
    logprobs = -draw.random(len(ids)).astype(np.float32) - 3
    return WeightedSample(Trajectory(0, seed, (1, 2, 3), ids, logprobs, "stop", 0), weight, 0.05)


SAMPLES = [sample(seed, weight) for seed, weight in enumerate((1.0, -1.0, -1.0, 1.0, -1.0, 0.1, -1.0, 1.0))]


NEGATIVE = [one for one in SAMPLES if one.weight < 0]


def steps(actor: Actor, *mini_batches: list[WeightedSample], step: int = 1) -> dict[str, float]:
    return actor.update(actor.prepare(StepBatch(tuple(tuple(samples) for samples in mini_batches), ()), step), 1e-2)


def weights(actor: Actor) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in actor.chunks[0].named_parameters()}


def test_rows_that_fill_a_micro_batch_up_for_fp8_train_nothing(model: Path) -> None:
    """Asked of the cpu backend, which has no use for them."""
    metrics, trained = [], []
    for multiple in (1, 16):
        actor = actor_of(model)
        actor._token_multiple = multiple
        metrics.append(steps(actor, SAMPLES[:4], SAMPLES[4:]))
        trained.append(weights(actor))
        assert {len(micro.tokens) % 16 for micro in actor.pack(SAMPLES)} == {0} or multiple == 1
    for name in ("policy/loss", "policy/grad_norm", "policy/entropy", "rollout/logprob_gap_max"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-5), name
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor, rtol=1e-4, atol=1e-6, msg=name)


class ClippedByHand:
    """The built-in loss, as a user would write it."""

    def weigh(self, rewards: torch.Tensor, judged: torch.Tensor) -> SampleWeights:
        return SampleWeights(rewards, judged)

    def token_loss(self, logprobs: torch.Tensor, entropy: torch.Tensor, batch: TrainBatch) -> torch.Tensor:
        old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        ratio = (logprobs - old).exp()
        return -torch.minimum(ratio * batch.weights, ratio.clamp(0.8, 1.2) * batch.weights)


def test_an_own_loss_that_says_the_same_trains_the_same(model: Path) -> None:
    """One form computes its gradient in the forward pass, the other recomputes the logits; the entropy bonus stays in both."""
    metrics, trained = [], []
    for own in (None, ClippedByHand()):
        actor = actor_of(model, own, logging={"sign_norms_every": 1})
        metrics.append(steps(actor, SAMPLES[:4], SAMPLES[4:]))
        trained.append(weights(actor))
    for name in ("policy/loss", "policy/loss_psr", "policy/loss_nsr", "policy/grad_norm", "policy/entropy", "policy/logprob_nsr"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-5), name
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    unknown = {"policy/grad_norm_head_psr", "policy/grad_norm_head_nsr", "policy/clip_fraction_psr", "policy/clip_fraction_nsr"}
    assert unknown <= metrics[0].keys() and not unknown & metrics[1].keys()


def test_a_sign_without_any_gradient_has_a_norm_of_zero(model: Path) -> None:
    """Every negative token is clipped in the second mini-batch, which is the first one again after a large step."""
    actor = actor_of(model, entropy_coefficient=0.0, eps_low=0.0, logging={"sign_norms_every": 1})
    prepared = actor.prepare(StepBatch((tuple(NEGATIVE), tuple(NEGATIVE)), ()), 1)
    actor.update(prepared, 1e-1)
    metrics = actor.update(replace(prepared, mini_batches=prepared.mini_batches[1:]), 0.0)
    assert metrics["policy/clip_fraction_nsr"] == 1.0
    assert metrics["policy/grad_norm_head_nsr"] == 0.0


def test_a_loss_that_is_no_number_stops_the_run(model: Path) -> None:
    actor = actor_of(model)
    prepared = actor.prepare(StepBatch((tuple(SAMPLES[:4]), tuple(SAMPLES[4:])), ()), 1)
    first, *rest = prepared.mini_batches[0]
    assert first.old_logprobs is not None
    spoiled = replace(first, old_logprobs=torch.full_like(first.old_logprobs, torch.nan))
    with pytest.raises(FloatingPointError, match="loss is nan: the update was lost"):
        actor.update(replace(prepared, mini_batches=((*[spoiled], *rest), *prepared.mini_batches[1:])), 1e-2)


def test_the_schedule_leaves_the_outputs_as_the_head_returned_them(model: Path) -> None:
    """megatron-core divides the loss that it is given, in place, and between pipeline stages on GPUs it frees the loss's memory."""
    actor = actor_of(model)
    outputs = actor._forward_backward(actor.pack(SAMPLES))
    assert len(outputs) > 1
    for output in outputs:
        assert output.loss.item() == pytest.approx(len(outputs) * output.token_loss.sum().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ({"form": "reinforce"}, lambda logprob, weight: -weight * logprob),
        ({"form": "probability"}, lambda logprob, weight: -weight * math.exp(logprob)),
        ({"form": "clipped"}, lambda logprob, weight: -weight),
    ],
)
def test_the_configured_form_is_the_loss_that_is_trained(model: Path, objective: dict[str, Any], expected: Any) -> None:
    actor = actor_of(model, entropy_coefficient=0.0, **objective)
    one = WeightedSample(Trajectory(0, 0, (1, 2), np.array([7], np.int32), np.zeros(1, np.float32), "stop", 0), -0.5, 0.25)
    metrics = steps(actor, [one])
    assert metrics["policy/loss"] == pytest.approx(0.25 * expected(metrics["policy/logprob"], -0.5), rel=1e-5)
    assert metrics["policy/loss_nsr"] == metrics["policy/loss"] and metrics["policy/grad_norm"] > 0


def test_a_rollout_correction_weighs_tokens_by_policy_over_engine_up_to_the_cap(model: Path) -> None:
    plain = steps(actor_of(model, entropy_coefficient=0.0), SAMPLES)
    far = steps(actor_of(model, entropy_coefficient=0.0, rollout_correction=1e-3), SAMPLES)
    assert "rollout/correction_mean" not in plain
    assert far["rollout/correction_mean"] == pytest.approx(1e-3, rel=1e-3)  # every token beyond so low a cap
    assert far["policy/loss"] == pytest.approx(1e-3 * plain["policy/loss"], rel=1e-3)
    assert far["policy/grad_norm"] == pytest.approx(1e-3 * plain["policy/grad_norm"], rel=1e-3)


def test_the_whole_gradients_of_the_signs_are_those_of_training_on_one_sign_alone(model: Path) -> None:
    probed = steps(actor_of(model, logging={"probe_every": 1}), SAMPLES)
    alone = {}
    for sign, name in ((1.0, "psr"), (-1.0, "nsr")):
        chosen = [s for s in SAMPLES if s.weight * sign > 0]
        alone[name] = steps(actor_of(model, entropy_coefficient=0.0), chosen)["policy/grad_norm"]
    both = steps(actor_of(model, entropy_coefficient=0.0), SAMPLES)["policy/grad_norm"]
    psr, nsr = probed["policy/grad_norm_psr"], probed["policy/grad_norm_nsr"]
    assert (psr, nsr) == (pytest.approx(alone["psr"], rel=1e-4), pytest.approx(alone["nsr"], rel=1e-4))
    assert psr**2 + nsr**2 + 2 * psr * nsr * probed["policy/grad_cosine"] == pytest.approx(both**2, rel=1e-4)


def test_measuring_the_signs_changes_nothing_else(model: Path) -> None:
    quiet, loud = (steps(actor_of(model, logging=logging), SAMPLES) for logging in ({}, {"sign_norms_every": 1, "probe_every": 2}))
    assert quiet == {name: value for name, value in loud.items() if "grad_norm_head" not in name} != loud
    probed = steps(actor_of(model, logging={"sign_norms_every": 2, "probe_every": 2}), SAMPLES, step=2)
    assert {name: probed[name] for name in loud} == loud


def test_one_sign_has_a_norm_and_no_cosine(model: Path) -> None:
    metrics = steps(actor_of(model, logging={"probe_every": 1, "sign_norms_every": 1}), [s for s in SAMPLES if s.weight < 0])
    assert metrics["policy/grad_norm_nsr"] > 0 and metrics["policy/grad_norm_head_nsr"] > 0
    assert not {"policy/grad_norm_psr", "policy/grad_cosine", "policy/grad_norm_head_psr", "policy/entropy_psr"} & metrics.keys()


def test_topr_is_reinforce_where_responses_became_likelier_and_lets_wrong_ones_go_where_they_did_not(model: Path) -> None:
    own = build_objective("topr")
    assert isinstance(own, OwnLoss)

    def engine_said(logprob: float, samples: list[WeightedSample]) -> list[WeightedSample]:
        said = [np.full_like(one.trajectory.rollout_logprobs, logprob) for one in samples]
        return [replace(one, trajectory=replace(one.trajectory, rollout_logprobs=row)) for one, row in zip(samples, said, strict=True)]

    plain = steps(actor_of(model, form="reinforce"), SAMPLES)
    likelier = steps(actor_of(model, own), engine_said(-30.0, SAMPLES))
    for name in ("policy/loss", "policy/loss_psr", "policy/loss_nsr", "policy/grad_norm"):
        assert likelier[name] == pytest.approx(plain[name], rel=1e-5), name
    less_likely = steps(actor_of(model, own), engine_said(0.0, SAMPLES))
    assert less_likely["policy/loss_psr"] == pytest.approx(plain["policy/loss_psr"], rel=1e-5)
    assert abs(less_likely["policy/loss_nsr"]) < 1e-2 * abs(plain["policy/loss_nsr"])


def test_kl_to_the_base_is_measured_when_it_is_due_and_trains_nothing(model: Path) -> None:
    quiet, loud = actor_of(model), actor_of(model, logging={"kl_to_base_every": 2})

    def logprobs() -> torch.Tensor:
        packed = quiet.pack(SAMPLES)
        return torch.cat([output.logprobs[batch.response_mask] for batch, output in zip(packed, quiet.score(packed), strict=True)]).double()

    base = logprobs()
    first = [steps(actor, SAMPLES[:4], SAMPLES[4:], step=1) for actor in (quiet, loud)]
    assert first[0] == first[1] and "policy/kl_reference" not in first[1]
    distance = base - logprobs()
    second = [steps(actor, SAMPLES, step=2) for actor in (quiet, loud)]
    expected = float((distance.exp() - distance - 1).mean())
    assert second[1].pop("policy/kl_reference") == pytest.approx(expected, rel=1e-4) and expected > 1e-3
    assert second[0] == second[1]
    assert all(torch.equal(tensor, weights(quiet)[name]) for name, tensor in weights(loud).items())
