"""A step's policy metrics: means over response tokens, whatever the packing, and split by sign."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from megatron_nsr.losses.policy_head import HeadOutputs
from megatron_nsr.losses.terms import LossTerms
from megatron_nsr.platform import distributed
from megatron_nsr.training.measurements import TokenSums, measure, measure_update, measured_metrics, update_metrics
from megatron_nsr.training.packing import pack
from megatron_nsr.training.parallel_groups import ParallelGroups
from megatron_nsr.types import TrainBatch, Trajectory, WeightedSample

ONE_RANK = ParallelGroups(0, 1, 0, 1, True, torch.device("cpu"), None)
LENGTHS, WEIGHTS, SCALE = (4, 2, 5), (0.5, -1.0, -1.0), 0.1


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    distributed.init_process_group()
    yield
    distributed.destroy()


def samples() -> list[WeightedSample]:
    def trajectory(length: int) -> Trajectory:
        return Trajectory(0, 0, (1, 2), np.arange(length, dtype=np.int32), np.linspace(-1, -2, length, dtype=np.float32), "stop", 0)

    return [WeightedSample(trajectory(length), weight, SCALE) for length, weight in zip(LENGTHS, WEIGHTS, strict=True)]


def outputs(batch: TrainBatch, *, elsewhere: float = 0.0) -> HeadOutputs:
    """Policy log-probs a quarter above the engine's; `elsewhere` is what stands at prompt and padding tokens."""
    inside = batch.response_mask
    logprobs = torch.where(inside, batch.rollout_logprobs + 0.25, torch.tensor(elsewhere))
    entropy = torch.where(inside, batch.targets.float(), torch.tensor(elsewhere))
    losses = torch.where(inside, batch.scale * batch.weights, torch.tensor(0.0))
    return HeadOutputs(losses.sum(), logprobs, entropy, losses, inside & (batch.targets == 1))


def measured(packings: Sequence[Sequence[WeightedSample]], **changes: float) -> dict[str, float]:
    batches = [pack(packing, token_multiple=4) for packing in packings]
    return measured_metrics(measure(batches, [outputs(batch, **changes) for batch in batches]), TokenSums(), 0.0, ONE_RANK)


def test_measured_metrics_are_means_over_response_tokens() -> None:
    got = measured([samples()])
    targets = [i for length in LENGTHS for i in range(length)]
    engine = [x for length in LENGTHS for x in np.linspace(-1, -2, length)]
    assert got["policy/entropy"] == pytest.approx(np.mean(targets))
    assert got["policy/logprob"] == pytest.approx(np.mean(engine) + 0.25)
    assert got["rollout/logprob_gap_mean"] == pytest.approx(0.25)
    assert got["rollout/logprob_gap_max"] == pytest.approx(0.25)


def test_micro_batches_prompts_and_padding_change_no_metric() -> None:
    one, two, three = samples()
    together = measured([[one, two, three]])
    assert measured([[three, one], [], [two]], elsewhere=1e6) == pytest.approx(together)


def test_a_probed_sample_stands_for_several_dropped_ones() -> None:
    one, two, _ = samples()
    kept, probed = pack([one]), pack([two])
    both = [measure([batch], [outputs(batch)]) for batch in (kept, probed)]
    got = measured_metrics(both[0], both[1], 3.0, ONE_RANK)
    tokens = LENGTHS[0] + 3 * LENGTHS[1]
    assert got["policy/entropy"] == pytest.approx((sum(range(LENGTHS[0])) + 3 * sum(range(LENGTHS[1]))) / tokens)


def test_the_largest_gap_is_kept_not_summed() -> None:
    batch = pack([samples()[0]])
    near, far = outputs(batch), outputs(batch)
    far.logprobs[-1] += 0.5
    for order in ([near, far], [far, near]):
        metrics = measured_metrics(measure([batch, batch], order), TokenSums(), 0.0, ONE_RANK)
        assert metrics["rollout/logprob_gap_max"] == pytest.approx(0.75)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_gap_that_is_no_number_counts_as_infinite(order: tuple[int, int]) -> None:
    batch = pack([samples()[0]])
    broken = outputs(batch)
    broken.logprobs[-1] = float("nan")
    both = [outputs(batch), broken]
    metrics = measured_metrics(measure([batch, batch], [both[i] for i in order]), TokenSums(), 0.0, ONE_RANK)
    assert metrics["rollout/logprob_gap_max"] == float("inf")


def test_nothing_measured_is_no_metric() -> None:
    empty = pack([])
    assert measured_metrics(measure([empty], [outputs(empty)]), TokenSums(), 0.0, ONE_RANK) == {}
    assert measured_metrics(TokenSums(), TokenSums(), 0.0, ONE_RANK) == {}


def update(batches: Sequence[TrainBatch], entropy_coefficient: float = 0.0) -> TokenSums:
    return measure_update(batches, [outputs(batch) for batch in batches], LossTerms(entropy_coefficient=entropy_coefficient))


def test_an_update_s_loss_is_split_by_the_sign_of_the_weight() -> None:
    got = update_metrics([update([pack(samples())])], [2.0], ONE_RANK)
    psr, nsr = SCALE * 0.5 * LENGTHS[0], -SCALE * (LENGTHS[1] + LENGTHS[2])
    assert got["policy/loss_psr"] == pytest.approx(psr)
    assert got["policy/loss_nsr"] == pytest.approx(nsr)
    assert got["policy/loss"] == pytest.approx(psr + nsr)
    assert got["policy/clip_fraction_psr"] == pytest.approx(1 / LENGTHS[0])
    assert got["policy/clip_fraction_nsr"] == pytest.approx(2 / (LENGTHS[1] + LENGTHS[2]))


def test_the_losses_of_the_signs_leave_the_entropy_bonus_out() -> None:
    """token_loss holds `-scale c H`, so adding it back leaves the policy's part; here the outputs hold none."""
    batch = pack([samples()[0]])
    plain, with_bonus = (update_metrics([update([batch], coefficient)], [1.0], ONE_RANK) for coefficient in (0.0, 0.5))
    assert with_bonus["policy/loss"] == plain["policy/loss"]
    assert with_bonus["policy/loss_psr"] - plain["policy/loss_psr"] == pytest.approx(SCALE * 0.5 * sum(range(LENGTHS[0])))


def test_updates_are_averaged_and_clip_fractions_weighted_by_tokens() -> None:
    one, _, three = samples()
    sums = [update([pack([one])]), update([pack([one]), pack([three])])]
    got = update_metrics(sums, [1.0, 4.0], ONE_RANK)
    assert got["policy/updates"] == 2.0
    assert got["policy/grad_norm"] == 2.5
    assert got["policy/loss_nsr"] == pytest.approx(-SCALE * LENGTHS[2] / 2)
    assert got["policy/clip_fraction_psr"] == pytest.approx(2 / (2 * LENGTHS[0]))


def test_a_step_without_updates_says_so_and_nothing_else() -> None:
    assert update_metrics([], [], ONE_RANK) == {"policy/updates": 0.0}


def test_a_sign_without_tokens_has_no_clip_fraction() -> None:
    got = update_metrics([update([pack([samples()[1]])])], [1.0], ONE_RANK)
    assert "policy/clip_fraction_psr" not in got
    assert got["policy/loss_psr"] == 0.0
