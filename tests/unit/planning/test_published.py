"""Formulas against published numbers. Sources, and what could not be compared, stand in docs/planning.md."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_nsr.planning.activations import kept_by_layer
from megatron_nsr.planning.engine import cache_per_token
from megatron_nsr.planning.flops import model_flops
from megatron_nsr.planning.generation import Engine, generate_on
from megatron_nsr.planning.hardware import GIB, GPUS
from megatron_nsr.planning.layout import Layout
from megatron_nsr.planning.memory import model_state
from megatron_nsr.planning.parameters import model_elements, stage_elements
from megatron_nsr.planning.passes import update_passes
from megatron_nsr.planning.published_models import PUBLISHED
from megatron_nsr.planning.step_time import Trainer
from megatron_nsr.planning.workload import Lengths, Workload

MIB = 1 << 20
H100 = GPUS["h100"]
LLAMA2_7B = replace(PUBLISHED["Llama-3.1-8B"], ffn=11008, query_groups=32, vocab_size=32000)
# A log of Megatron 0.10: Llama-2-7B, bf16, 4,096 tokens, 4 stages, 2 data-parallel ranks with a distributed optimizer.
LLAMA2_LAYOUT = Layout(8, 4096, pipeline=4, distributed_optimizer=True)


def test_model_state_is_that_of_megatrons_own_report_and_of_what_it_then_allocated() -> None:
    found = []
    for stage in (0, 1):
        state = model_state(stage_elements(LLAMA2_7B, LLAMA2_LAYOUT, stage), LLAMA2_LAYOUT, 2)
        found.append((state.weights + state.gradients + state.optimizer) / MIB)
    assert found[0] == pytest.approx(20029.52, rel=1e-3)  # "Theoretical memory footprints: weight and optimizer"
    assert found == [pytest.approx(20034.75, rel=0.005), pytest.approx(18598.75, rel=0.005)]  # "allocated", ranks 0 and 2


def test_a_micro_batch_more_in_flight_costs_what_the_log_shows() -> None:
    """No independent check: docs/planning.md says why."""
    kept = []
    for stage, most in enumerate((30227.65, 25079.27, 20931.01)):  # "max allocated", with 4, 3 and 2 micro-batches in flight
        state = model_state(stage_elements(LLAMA2_7B, LLAMA2_LAYOUT, stage), LLAMA2_LAYOUT, 2)
        kept.append(most - (state.weights + state.gradients + state.optimizer / 3) / MIB)  # Adam's moments come after the first peak
    more = 8 * kept_by_layer(LLAMA2_7B, LLAMA2_LAYOUT, 2, "te") / MIB
    assert more == pytest.approx(kept[0] - kept[1], rel=0.01) and more == pytest.approx(kept[1] - kept[2], rel=0.01)


@pytest.mark.parametrize(
    ("gpus", "data", "context", "tokens", "batch", "published", "error"),
    [(8192, 64, 1, 8192, 32, 430, 0.05), (16384, 128, 1, 8192, 16, 400, 0.05), (16384, 8, 16, 131072, 16, 380, 0.2)],
)
def test_pre_training_a_405b_model_is_as_fast_as_its_authors_say(
    gpus: int, data: int, context: int, tokens: int, batch: int, published: float, error: float
) -> None:
    model = PUBLISHED["Llama-3.1-405B"]
    slots = replace(model, num_layers=128)  # 126 layers, the embedding and the head in 16 stages of 8 chunks
    layout = Layout(gpus, tokens, tensor=8, pipeline=16, virtual_pipeline=8, context=context, sequence=True, distributed_optimizer=True)
    lengths = Lengths(1, tokens - 1, 0.0, tokens - 1)
    work = Workload(data * batch, 1, 1, 1.0, lengths, old_logprobs=False, reference=False, critic_mini_batches=0)
    seconds = Trainer(slots, layout, work, H100, 2).over(replace(update_passes(work), head=0)).seconds  # the head has a slot of its own
    assert model_flops(model, work, work.kept_tokens) / seconds / gpus / 1e12 == pytest.approx(published, rel=error)


@pytest.mark.parametrize(
    ("name", "slots", "layout", "batch", "published"),
    [
        ("Llama-3.1-70B-Instruct", 80, Layout(64, 8192, tensor=4, pipeline=8, virtual_pipeline=5), 128, 719),
        ("Llama-3.1-70B-Instruct", 80, Layout(64, 8192, tensor=4, pipeline=8, virtual_pipeline=5), 256, 728),
        ("Llama-3.1-405B", 128, Layout(1024, 8192, tensor=8, pipeline=8, virtual_pipeline=8, context=2), 512, 737),
        ("Llama-3.1-405B", 128, Layout(1024, 8192, tensor=8, pipeline=8, virtual_pipeline=8, context=2), 1536, 784),
    ],
)
def test_pre_training_in_fp8_is_as_fast_as_published(name: str, slots: int, layout: Layout, batch: int, published: float) -> None:
    """The 70B model's runs set FP8_MATMUL_SHARE; the 405B model's did not."""
    layout = replace(layout, sequence=True, distributed_optimizer=True, fp8="tensorwise")
    work = Workload(batch, 1, 1, 1.0, Lengths(1, 8191, 0.0, 8191), old_logprobs=False, reference=False, critic_mini_batches=0)
    passes = replace(update_passes(work), head=0 if slots == 128 else 3)  # there the head has a slot of its own
    seconds = Trainer(replace(PUBLISHED[name], num_layers=slots), layout, work, H100, 2).over(passes).seconds
    assert model_flops(PUBLISHED[name], work, work.kept_tokens) / seconds / layout.gpus / 1e12 == pytest.approx(published, rel=0.05)


@pytest.mark.parametrize(
    ("name", "gpus", "sequence", "engine_tensor", "layout", "published"),
    [
        ("Llama-3.1-8B", 16, 1060, 1, {"pipeline": 2}, 97.7),
        ("Qwen3-32B", 32, 3206, 4, {"tensor": 4, "pipeline": 4, "sequence": True}, 393),
        ("Qwen3-30B-A3B", 32, 3154, 4, {"tensor": 2, "expert": 8, "sequence": True}, 225),
    ],
)
def test_a_colocated_grpo_step_takes_no_longer_than_measured_and_at_least_a_third(
    name: str, gpus: int, sequence: int, engine_tensor: int, layout: dict[str, int], published: float
) -> None:
    """The published recipes name no spread of lengths and no share of memory: the prediction is a bound, not a fit."""
    shape, prompt = PUBLISHED[name], 150
    lengths = Lengths(prompt, sequence - prompt, 0.6, 4096 - prompt)
    work = Workload(64, 32, 4, 1.0, lengths, old_logprobs=True, reference=True, critic_mini_batches=0)
    trainer = Trainer(shape, Layout(gpus, 4096, distributed_optimizer=True, recompute="full", **layout), work, H100, 2)
    per_token = cache_per_token(shape, engine_tensor, 2)
    cache = 0.6 * H100.memory_bytes - model_elements(shape) * 2 / engine_tensor - 4 * GIB
    engine = Engine(shape, H100, engine_tensor, 2, int(cache / per_token / sequence), per_token)
    sampled = max(one.seconds for one in generate_on(engine, gpus // engine_tensor, 64, 32, lengths, (0, 1)))
    seconds = sampled + trainer.seconds + trainer.push(servers=False).seconds
    assert published / 3 <= seconds <= published
