"""FP8 in a plan: copies of weights, smaller activations, faster linear layers and nothing else, a smaller engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_nsr.config import Config
from megatron_nsr.config_files import parse_config
from megatron_nsr.planning.activations import kept_by_layer
from megatron_nsr.planning.hardware import GPUS
from megatron_nsr.planning.layout import Layout
from megatron_nsr.planning.parameters import layer_elements
from megatron_nsr.planning.plan import Plan, make_plan
from megatron_nsr.planning.published_models import PUBLISHED
from megatron_nsr.planning.workload import lengths_of
from megatron_nsr.types import UserError

SEVEN, MIXTURE = PUBLISHED["Qwen2.5-7B"], PUBLISHED["Qwen3-30B-A3B"]
LAYER = layer_elements(SEVEN, 1, 1).total


def plan_of(
    model: dict[str, Any] | None = None, rollout: dict[str, Any] | None = None, gpu: str = "h200", offload: str = "all", **parallel: Any
) -> Plan:
    config: Config = parse_config(
        {
            "run": {"dir": "unused", "steps": 1},
            "model": {"path": "models/Qwen2.5-7B", **(model or {})},
            "data": {"template": "plain"},
            "objective": {"name": "reinforce"},
            "parallel": {"distributed_optimizer": True, **parallel},
            "rollout": {"sleep_level": 2, **(rollout or {})},
            "training": {"offload": offload},
        }
    )
    lengths = lengths_of(config, prompt_mean=None, response_mean=None, response_spread=None)
    return make_plan(config, SEVEN, 8, GPUS[gpu], lengths)


def test_weights_have_two_rounded_copies_that_are_freed_with_the_gradients() -> None:
    assert plan_of({"fp8": "blockwise"}).memory.parts["weights in FP8"] == (2 * 28 * LAYER, 0, 0)
    assert plan_of({"fp8": "blockwise"}, offload="none").memory.parts["weights in FP8"] == (2 * 28 * LAYER,) * 3
    assert plan_of({"fp8": "blockwise"}).phases["offload"] == plan_of().phases["offload"]  # nobody moves them
    assert plan_of({"fp8": "tensorwise", "fp8_edge_layers": 2}).memory.parts["weights in FP8"][0] == pytest.approx(2 * 24 * LAYER)
    of_stage = plan_of({"fp8": "tensorwise", "fp8_edge_layers": 2}, pipeline=2).memory.parts["weights in FP8"][0]
    assert of_stage == pytest.approx(2 * 12 * LAYER)  # the other edge is the other stage's
    assert "weights in FP8" not in plan_of().memory.parts


def test_only_linear_layers_get_faster() -> None:
    plain, fp8, edges = plan_of(), plan_of({"fp8": "tensorwise"}), plan_of({"fp8": "tensorwise", "fp8_edge_layers": 14})
    seconds = [plan.phases["update"].spent["compute"] for plan in (plain, fp8, edges)]
    assert seconds[0] / 2 < seconds[1] < 0.7 * seconds[0] and seconds[2] == pytest.approx(seconds[0])
    assert plain.flops == fp8.flops and plain.phases["rollout"] == fp8.phases["rollout"]


@pytest.mark.parametrize("shape", [SEVEN, MIXTURE], ids=["dense", "mixture"])
def test_a_layer_keeps_the_inputs_of_its_products_in_one_byte(shape: Any) -> None:
    layout = Layout(1, 1000)
    less = kept_by_layer(shape, layout, 2, "te") - kept_by_layer(shape, replace(layout, fp8="tensorwise"), 2, "te")
    queries = shape.heads * shape.head_dim  # attention's output is kept as it was too
    if shape.moe is None:
        assert less == 1000 * (2 * shape.hidden + shape.ffn - queries)
    else:
        assert less == 1000 * (shape.hidden - queries + shape.moe.experts_per_token * (shape.hidden + shape.moe.ffn))


def test_an_engine_in_fp8_is_smaller_and_leaves_more_cache() -> None:
    plain, fp8 = plan_of(), plan_of(rollout={"quantization": "fp8"})
    less = plain.memory.parts["engine weights"][2] - fp8.memory.parts["engine weights"][2]
    assert less == 28 * LAYER
    assert fp8.memory.parts["engine KV cache"][2] - plain.memory.parts["engine KV cache"][2] == pytest.approx(less)
    assert fp8.phases["rollout"].seconds < plain.phases["rollout"].seconds and fp8.phases["update"] == plain.phases["update"]


@pytest.mark.parametrize(
    ("model", "rollout", "key"), [({"fp8": "delayed"}, {}, "model.fp8=delayed"), ({}, {"quantization": "fp8"}, "rollout.quantization=fp8")]
)
def test_what_has_no_fp8_cannot_be_planned_with_it(model: Any, rollout: Any, key: str) -> None:
    with pytest.raises(UserError, match=f"{key}: --gpu cpu has no FP8"):
        plan_of(model, rollout, gpu="cpu")


def test_a_layout_that_fp8_products_do_not_take_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.fp8_edge_layers=15: twice that is more than num_hidden_layers=28"):
        plan_of({"fp8": "tensorwise", "fp8_edge_layers": 15})
