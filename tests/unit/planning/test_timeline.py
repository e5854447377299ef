"""Time: what can only get longer, what is conserved, and the timeline of steps."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nsr.config_files import load_config
from megatron_nsr.models.hf_config import ModelShape
from megatron_nsr.planning.command import show_plan
from megatron_nsr.planning.communication import gradient_bytes, parameter_bytes
from megatron_nsr.planning.flops import head_products
from megatron_nsr.planning.generation import Engine, draw_lengths, generate, generate_on
from megatron_nsr.planning.hardware import GPUS, bandwidth
from megatron_nsr.planning.layout import Layout
from megatron_nsr.planning.parameters import stage_elements
from megatron_nsr.planning.passes import update_passes
from megatron_nsr.planning.plan import Plan, make_plan
from megatron_nsr.planning.published_models import PUBLISHED
from megatron_nsr.planning.scaling import MODES, STEPS, scaling
from megatron_nsr.planning.search import best_layouts
from megatron_nsr.planning.step_time import Trainer
from megatron_nsr.planning.timeline import ENGINES, TRAINER, Deployment, Timeline, simulate
from megatron_nsr.planning.workload import Lengths, Workload, lengths_of, workload_of
from megatron_nsr.types import UserError

SEVEN = PUBLISHED["Qwen2.5-7B"]
LENGTHS = Lengths(200, 300, 0.7, 1000)
WORK = Workload(16, 4, 2, 1.0, LENGTHS, old_logprobs=True, reference=False, critic_mini_batches=0)
ENGINE = Engine(SEVEN, GPUS["h200"], 1, 2, 8, 57344.0)
NSR = Path(__file__).parents[3] / "configs" / "paper" / "qwen2.5_math_7b" / "nsr.yaml"


CONFIGS = NSR.parents[2]


def plan_of(file: Path, shape: ModelShape, gpus: int, *changes: str) -> Plan:
    config = load_config(file, list(changes))
    return make_plan(config, shape, gpus, GPUS["h200"], lengths_of(config, prompt_mean=None, response_mean=None, response_spread=None))


def test_a_critic_with_smaller_mini_batches_makes_its_own_updates() -> None:
    def work(*changes: str) -> Workload:
        return workload_of(load_config(NSR.with_name("ppo.yaml"), list(changes)), LENGTHS)

    assert (work().mini_batches, work().critic_mini_batches) == (4, 4)
    many = work("critic.mini_batch_prompts=32")
    assert (many.mini_batches, many.critic_mini_batches) == (4, 32)
    single = ("objective.mini_batch_prompts=1024",)
    assert work(*single).old_logprobs  # for the KL in the reward
    assert not work(*single, "objective.kl_coefficient=0").old_logprobs
    layout = Layout(8, 16384)
    few, more = (Trainer(SEVEN, layout, each, GPUS["h200"], 2).phases() for each in (work(), many))
    assert more["critic"].spent["HBM"] > few["critic"].spent["HBM"]
    assert more["update"].spent["HBM"] == pytest.approx(few["update"].spent["HBM"])


def test_a_critic_sends_and_computes_as_much_as_its_passes() -> None:
    layout = ("parallel.tensor=2", "parallel.sequence=true", "parallel.distributed_optimizer=true", "training.recompute=none")
    both = plan_of(NSR.with_name("ppo.yaml"), SEVEN, 8, *layout, "critic.mini_batch_prompts=64")
    policy = plan_of(NSR.with_name("ppo.yaml"), SEVEN, 8, *layout, "objective.name=reinforce", "objective.form=clipped")
    head = head_products(SEVEN) * policy.workload.kept_tokens * policy.workload.response_share
    layers = policy.flops["old_logprobs"] - head
    assert both.flops["critic"] == pytest.approx(4 * layers)  # judged once, then forward and twice that backward; no head
    assert both.flops["update"] == policy.flops["update"]
    sent = {name: both.communication[name] / policy.communication[name] for name in policy.communication}
    assert sent["tensor parallel"] == pytest.approx((1 + 1 + 1 + 2 + 2) / (1 + 2))  # log-probs, reference, judged, two updates
    assert 4 < sent["data parallel, gradients"] < 5  # 16 updates beside 4, without the head
    assert sent["push, inside a stage"] == 1


@pytest.mark.parametrize(
    ("file", "model", "gpus"),
    [
        ("paper/qwen2.5_math_7b/ppo.yaml", "Qwen2.5-Math-7B", 8),  # a critic, a reference and old log-probs
        ("scale/qwen2.5_7b_1x8.yaml", "Qwen2.5-7B", 8),  # offload and sleep
        ("scale/llama3.1_405b_64x8.yaml", "Llama-3.1-405B", 512),  # servers, one step ahead
    ],
)
def test_a_simulated_step_and_a_candidate_count_what_the_plan_counts(file: str, model: str, gpus: int) -> None:
    plan = plan_of(CONFIGS / file, PUBLISHED[model], gpus, "data.prompts_per_step=256", "objective.mini_batch_prompts=64")
    rollout = plan.config.rollout
    mode = MODES[1 + rollout.max_staleness] if rollout.mode == "server" else MODES[0]
    lengths = plan.workload.lengths
    (point,) = [one for one in scaling(plan.config, plan.shape, gpus, plan.gpu, lengths) if (one.mode, one.gpus) == (mode, gpus)]
    seconds = {name: phase.seconds for name, phase in plan.phases.items()}
    deployment = point.timeline.deployment
    assert deployment.train_seconds == pytest.approx(sum(seconds.values()) - seconds["rollout"] - seconds["push"])
    assert deployment.push_seconds == pytest.approx(seconds["push"])
    first = generate_on(deployment.engine, deployment.engines, plan.workload.prompts, plan.workload.samples, lengths, (0, 1))
    assert max(one.seconds for one in first) == pytest.approx(seconds["rollout"])
    assert point.timeline.seconds / STEPS == pytest.approx(plan.step_seconds, rel=0.05)  # the draws' lengths are not the mean
    assert point.fits == plan.fits
    candidates = best_layouts(plan.config, plan.shape, gpus, plan.gpu, lengths, count=10_000)
    own = [one.seconds for one in candidates if one.layout == plan.layout]
    assert own == [pytest.approx(sum(seconds.values()) - seconds["rollout"])]


def deployment(*, shared: bool, ahead: int = 0, engines: int = 4, train: float = 5.0) -> Deployment:
    return Deployment(ENGINE, engines, 4, train, 0.5, shared, ahead)


@given(mean=st.floats(1, 2000), spread=st.floats(0, 2), cap=st.integers(1, 3000), seed=st.integers(0, 99))
def test_lengths_keep_to_their_cap_and_to_their_seed(mean: float, spread: float, cap: int, seed: int) -> None:
    lengths = Lengths(1, mean, spread, cap)
    drawn = draw_lengths(lengths, 50, (seed, 1))
    assert drawn.min() >= 1 and drawn.max() <= cap
    assert np.array_equal(drawn, draw_lengths(lengths, 50, (seed, 1)))


def test_drawn_lengths_have_the_mean_and_the_spread_that_were_asked_for() -> None:
    drawn = draw_lengths(Lengths(1, 500, 0.5, 100_000), 200_000, (0,))
    assert drawn.mean() == pytest.approx(500, rel=0.01) and drawn.std() / drawn.mean() == pytest.approx(0.5, rel=0.03)


@settings(max_examples=30)
@given(engines=st.integers(1, 16), seed=st.integers(0, 9))
def test_engines_sample_every_token_once(engines: int, seed: int) -> None:
    done = generate_on(ENGINE, engines, 16, 4, LENGTHS, (seed, 1))
    assert len(done) == engines
    assert sum(one.tokens for one in done) == draw_lengths(LENGTHS, 64, (seed, 1)).sum()


@settings(max_examples=30)
@given(responses=st.lists(st.integers(1, 400), min_size=1, max_size=40), room=st.integers(1, 12))
def test_a_longer_response_or_less_room_is_never_faster(responses: list[int], room: int) -> None:
    engine = replace(ENGINE, room=room)
    seconds = generate(engine, 1, 100, responses).seconds
    assert generate(engine, 1, 100, [*responses, 10]).seconds > seconds
    assert generate(replace(engine, room=room + 1), 1, 100, responses).seconds <= seconds * (1 + 1e-9)
    assert seconds >= max(responses) * engine.step_seconds(1, 0)


def test_one_sequence_decodes_at_the_speed_of_reading_the_weights() -> None:
    step = ENGINE.step_seconds(1, 0)
    assert step == pytest.approx(2 * 7.07e9 / (4.8e12 * 0.8) + 3e-3, rel=0.01)  # the embedding is looked up, not read


@settings(max_examples=25)
@given(tensor=st.sampled_from([1, 2, 4]), pipeline=st.sampled_from([1, 2, 4]), recompute=st.sampled_from(["none", "full"]))
def test_more_samples_and_more_recomputing_take_longer(tensor: int, pipeline: int, recompute: Any) -> None:
    layout = Layout(32, 8192, tensor=tensor, pipeline=pipeline, sequence=tensor > 1, distributed_optimizer=True, recompute=recompute)
    trainer = Trainer(SEVEN, layout, replace(WORK, prompts=512), GPUS["h200"], 2)
    assert replace(trainer, workload=replace(WORK, prompts=1024)).seconds > trainer.seconds
    assert replace(trainer, layout=replace(layout, recompute="full")).seconds >= trainer.seconds
    assert replace(trainer, gpu=replace(GPUS["h200"], flops=2e15)).seconds < trainer.seconds
    assert all(phase.seconds == pytest.approx(sum(phase.spent.values())) for phase in trainer.phases().values())


def test_context_parallel_traffic_costs_what_attention_does_not_hide() -> None:
    layout = Layout(32, 8192, tensor=8, context=4, sequence=True)  # the ring goes from node to node
    shape = replace(SEVEN, query_groups=32, heads=32)

    def network(tokens: int) -> float:
        work = replace(WORK, prompts=2**22 // tokens, samples=1, mini_batches=1, lengths=Lengths(1, tokens - 1, 0.0, tokens - 1))
        return Trainer(shape, layout, work, GPUS["h200"], 2).over(update_passes(work)).spent["network"]

    elements = stage_elements(shape, layout, 0)
    reduced = gradient_bytes(layout, elements) + parameter_bytes(layout, elements, 2)
    rest = reduced / bandwidth(GPUS["h200"], layout.replicas, stride=8)  # once an update, whatever the sequences
    assert network(131072) == pytest.approx(rest) and network(512) > 1.5 * rest


def overlapping(timeline: Timeline, group: str) -> bool:
    events = sorted((event for event in timeline.events if event.group == group), key=lambda event: event.start)
    return any(second.start < first.end - 1e-9 for first, second in pairwise(events))


@settings(max_examples=30)
@given(seed=st.integers(0, 20), ahead=st.integers(0, 1), train=st.floats(0.1, 30))
def test_nobody_does_two_things_at_once_and_nobody_works_longer_than_there_is_time(seed: int, ahead: int, train: float) -> None:
    timeline = simulate(deployment(shared=False, ahead=ahead, train=train), WORK, 3, seed)
    assert not overlapping(timeline, ENGINES) and not overlapping(timeline, TRAINER)
    assert 0 < timeline.busy_share(ENGINES) <= 1 and 0 < timeline.busy_share(TRAINER) <= 1
    assert all(0 <= event.start <= event.end <= timeline.seconds for event in timeline.events)
    assert len([event for event in timeline.events if event.name == "train"]) == 3


@settings(max_examples=30)
@given(seed=st.integers(0, 20), ahead=st.integers(0, 1), train=st.floats(0.1, 30))
def test_a_push_waits_until_nothing_samples_and_nothing_trains(seed: int, ahead: int, train: float) -> None:
    timeline = simulate(deployment(shared=False, ahead=ahead, train=train), WORK, 3, seed)
    for push in (event for event in timeline.events if event.name == "push"):
        for other in timeline.events:
            if other is not push:
                assert other.end <= push.start + 1e-9 or other.start >= push.end - 1e-9


@settings(max_examples=30)
@given(seed=st.integers(0, 20), train=st.floats(0.1, 30))
def test_one_step_ahead_is_never_slower_and_samples_the_same(seed: int, train: float) -> None:
    ahead, behind, longer = (simulate(deployment(shared=False, ahead=a, train=train), WORK, n, seed) for a, n in ((1, 4), (0, 4), (0, 5)))
    assert ahead.tokens == behind.tokens
    first = next(event for event in longer.events if event.name == "rollout")
    assert ahead.seconds <= longer.seconds - first.end  # the draws of steps 2 to 5
    assert ahead == simulate(deployment(shared=False, ahead=1, train=train), WORK, 4, seed)


def test_a_config_scales_from_its_gpus_to_1024() -> None:
    config = load_config(NSR, ["data.prompts_per_step=128", "objective.mini_batch_prompts=64"])
    lengths = lengths_of(config, prompt_mean=None, response_mean=None, response_spread=None)
    points = scaling(config, PUBLISHED["Qwen2.5-Math-7B"], 8, GPUS["h200"], lengths)
    for mode in MODES:
        mine = [point for point in points if point.mode == mode]
        assert [point.gpus for point in mine] == [8 << doubling for doubling in range(8)]
        speeds = [point.timeline.tokens_per_second for point in mine]
        assert all(later >= 0.95 * sooner for sooner, later in pairwise(speeds))
    assert points[0].efficiency == 1 and points[-1].efficiency < 0.2  # a batch of this size does not feed 1,024 GPUs


def test_the_command_draws_its_picture_and_refuses_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(NSR, ["data.prompts_per_step=16", "objective.mini_batch_prompts=16"])
    assert show_plan(config, gpus=256, gpu="h200", simulate=True, plot=tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "fits: " in printed and "the fastest layouts that fit" in printed and "disaggregated" in printed
    with pytest.raises(UserError, match=r"--plot out\.pdf: the picture is a PNG"):
        show_plan(config, gpus=512, gpu="h200", simulate=True, plot=Path("out.pdf"))
    with pytest.raises(UserError, match="with --simulate only"):
        show_plan(config, gpus=8, gpu="h200", plot=tmp_path / "scaling.png")
