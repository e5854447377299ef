"""Memory by part: what every layout keeps in all, what grows and what shrinks, and what is said where it does not fit."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nsr.config import Config
from megatron_nsr.config_files import parse_config
from megatron_nsr.models.hf_config import ModelShape
from megatron_nsr.models.transformer_fields import ALLOWED
from megatron_nsr.planning.activations import activation_bytes, head_workspace, kept_by_layer
from megatron_nsr.planning.flops import passes_flops
from megatron_nsr.planning.hardware import GIB, GPUS, find_gpu
from megatron_nsr.planning.layout import Layout, layout_of, trainer_gpus
from megatron_nsr.planning.memory import MOMENTS, model_state, plan_memory, push_bytes
from megatron_nsr.planning.parameters import Elements, layer_elements, model_elements, stage_elements
from megatron_nsr.planning.passes import update_passes
from megatron_nsr.planning.published_models import PUBLISHED, model_shape
from megatron_nsr.planning.recomputation import PLANNED_FIELDS, unplanned
from megatron_nsr.planning.workload import lengths_of, workload_of
from megatron_nsr.types import UserError
from megatron_nsr.weights.mapping import hf_names, hf_tensor_shape
from megatron_nsr.weights.push_plan import plan_push

SEVEN = PUBLISHED["Qwen2.5-7B"]
MIXTURE = PUBLISHED["Qwen3-30B-A3B"]
H200 = GPUS["h200"]


def config_of(**sections: dict[str, Any]) -> Config:
    values: dict[str, Any] = {
        "run": {"dir": "unused", "steps": 1},
        "model": {"path": "models/Qwen2.5-7B"},
        "data": {"template": "plain"},
        "objective": {"name": "reinforce"},
    }
    return parse_config({name: values.get(name, {}) | sections.get(name, {}) for name in {**values, **sections}})


def memory_of(config: Config, shape: ModelShape, gpus: int, gpu: str = "h200") -> Any:
    lengths = lengths_of(config, prompt_mean=None, response_mean=None, response_spread=None)
    return plan_memory(config, shape, layout_of(config, shape, gpus), workload_of(config, lengths), find_gpu(gpu))


@pytest.mark.parametrize(("name", "billions"), [("Qwen3-4B", 4.02), ("Llama-3.1-8B", 8.03), ("Llama-3.1-405B", 405.85)])
def test_a_published_model_has_the_parameters_of_its_name(name: str, billions: float) -> None:
    assert model_elements(PUBLISHED[name]) / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("name", ["Qwen2.5-Math-7B", "Qwen3-4B", "Llama-3.1-8B-Instruct"])
def test_parameters_are_those_of_the_files(name: str) -> None:
    shape = PUBLISHED[name]
    assert model_elements(shape) == sum(math.prod(hf_tensor_shape(tensor, shape)) for tensor in hf_names(shape))


@given(tensor=st.sampled_from([1, 2, 4]), pipeline=st.sampled_from([1, 2, 4, 7]), tied=st.booleans())
def test_stages_and_shards_together_are_the_model(tensor: int, pipeline: int, tied: bool) -> None:
    shape = replace(SEVEN, tie_embeddings=tied)
    layout = Layout(tensor * pipeline, 1024, tensor=tensor, pipeline=pipeline)
    found = tensor * sum(stage_elements(shape, layout, stage).total for stage in range(pipeline))
    norms = (tensor - 1) * shape.hidden * (2 * shape.num_layers + 1)  # whole on every tensor-parallel rank
    copy = shape.vocab_size * shape.hidden if tied and pipeline > 1 else 0
    assert found == model_elements(shape) + norms + copy


@given(expert=st.sampled_from([1, 2, 8, 128]))
def test_expert_parallel_ranks_share_the_experts_and_nothing_else(expert: int) -> None:
    whole, part = layer_elements(MIXTURE, 1, 1), layer_elements(MIXTURE, 1, expert)
    assert (part.dense, part.experts * expert) == (whole.dense, whole.experts)


def test_a_critic_has_one_row_in_place_of_the_head() -> None:
    layout = Layout(1, 1024)
    assert stage_elements(SEVEN, layout, 0).total - stage_elements(SEVEN, layout, 0, critic=True).total == SEVEN.hidden * (152064 - 1)


@given(data=st.sampled_from([1, 2, 8, 64]), element=st.sampled_from([2, 4]))
def test_a_distributed_optimizer_cuts_its_state_over_the_ranks(data: int, element: int) -> None:
    whole = model_state(Elements(1000), Layout(data, 1024), element)
    cut = model_state(Elements(1000), Layout(data, 1024, distributed_optimizer=True), element)
    assert (cut.weights, cut.gradients) == (whole.weights, whole.gradients)
    assert cut.optimizer * data == pytest.approx(whole.optimizer)
    assert whole.weights + whole.gradients + whole.optimizer == 1000 * (18 if element == 2 else 16)


@given(tokens=st.integers(64, 65536), tensor=st.sampled_from([1, 2, 4]), backend=st.sampled_from(["te", "cpu"]))
def test_recomputing_keeps_less_and_more_tokens_keep_more(tokens: int, tensor: int, backend: Any) -> None:
    layout = Layout(tensor, tokens, tensor=tensor, sequence=tensor > 1)
    kept = {mode: kept_by_layer(SEVEN, replace(layout, recompute=mode), 2, backend) for mode in ("none", "selective", "full")}
    assert (
        kept["full"] < kept["selective"] <= kept["none"] <= kept_by_layer(SEVEN, replace(layout, micro_batch_tokens=2 * tokens), 2, backend)
    )


@pytest.mark.parametrize("backend", ["te", "cpu"])
@pytest.mark.parametrize("shape", [SEVEN, MIXTURE], ids=["dense", "mixture"])
def test_a_recomputed_mlp_keeps_more_than_whole_layers_and_computes_less(shape: ModelShape, backend: Any) -> None:
    module = "mlp" if shape.moe is None else "moe"

    def of(recompute: str, **fields: Any) -> tuple[float, float]:
        config = config_of(training={"recompute": recompute}, model={"path": "models/Qwen2.5-7B", "transformer": fields})
        layout = layout_of(config, shape, 8)
        work = workload_of(config, lengths_of(config, prompt_mean=None, response_mean=None, response_spread=None))
        return kept_by_layer(shape, layout, 2, backend), passes_flops(shape, layout, work, update_passes(work))

    none, mlp, full = of("none"), of("selective", recompute_modules=[module]), of("full")
    assert none[0] > mlp[0] > full[0] and none[1] < mlp[1] < full[1]
    assert of("full", recompute_method="block", recompute_num_layers=shape.num_layers) == pytest.approx(full)
    half = of("full", recompute_method="block", recompute_num_layers=shape.num_layers // 2)
    assert half == tuple(pytest.approx((a + b) / 2) for a, b in zip(none, full, strict=True))
    assert of("full", recompute_num_layers=4) == pytest.approx((full[0] / 4, full[1]))


def test_saved_activations_may_be_cut_over_tensor_parallel_ranks() -> None:
    whole, cut = (
        layout_of(config_of(parallel={"tensor": 4}, training={"recompute": "full"}, model={"path": "x", "transformer": fields}), SEVEN, 8)
        for fields in ({}, {"distribute_saved_activations": True})
    )
    assert kept_by_layer(SEVEN, cut, 2, "te") == kept_by_layer(SEVEN, whole, 2, "te") / 4


def test_what_a_plan_leaves_out_is_named() -> None:
    assert (
        unplanned(config_of(training={"recompute": "selective"}, model={"path": "x", "transformer": {"recompute_modules": ["mlp"]}})) == []
    )
    fields = {"cpu_offloading": True, "recompute_modules": ["mlp", "layernorm"]}
    found = unplanned(config_of(model={"path": "x", "transformer": fields}, logging={"probe_every": 5}, objective={"name": "reinforce"}))
    assert found == [
        "model.transformer.cpu_offloading=True",
        "model.transformer.recompute_modules=['mlp', 'layernorm']",
        "logging.probe_every=5",
    ]
    assert set(PLANNED_FIELDS) <= set(ALLOWED)


def test_context_parallel_ranks_on_a_cpu_keep_the_keys_and_values_of_all() -> None:
    def kept(context: int, backend: Any) -> float:
        return kept_by_layer(SEVEN, Layout(context, 512 * context, context=context), 4, backend)

    assert kept(4, "te") == kept(2, "te") == kept(1, "te")
    keys = 4 * 512 * SEVEN.query_groups * SEVEN.head_dim
    assert kept(2, "cpu") - kept(1, "cpu") >= 4 * keys
    assert kept(4, "cpu") - kept(2, "cpu") >= 8 * keys


def test_a_micro_batch_of_a_small_run_holds_no_more_than_its_samples() -> None:
    small = {"data": {"template": "plain", "prompts_per_step": 4, "max_prompt_tokens": 64}, "rollout": {"max_response_tokens": 193}}
    config = config_of(**small, objective={"name": "reinforce", "mini_batch_prompts": 4})
    assert config.training.tokens_per_micro_batch == 16384
    assert layout_of(config, SEVEN, 1).micro_batch_tokens == 4 * 8 * 256
    assert layout_of(config, SEVEN, 8).micro_batch_tokens == 4 * 256
    assert layout_of(config, SEVEN, 64).micro_batch_tokens == 256


@given(stage=st.integers(0, 3), virtual=st.sampled_from([1, 7]), micro_batches=st.integers(1, 32))
def test_earlier_stages_and_more_micro_batches_keep_no_less(stage: int, virtual: int, micro_batches: int) -> None:
    layout = Layout(4, 1024, pipeline=4, virtual_pipeline=virtual)

    def kept(count: int, where: int) -> float:
        return activation_bytes(SEVEN, layout, count, where, 2, "te")

    assert kept(micro_batches, stage) <= kept(micro_batches + 1, stage)
    if stage < 2:  # the last one also has the final norm and the head's gradient
        assert kept(micro_batches, stage) >= kept(micro_batches, stage + 1)


def test_the_head_never_holds_tokens_times_vocabulary() -> None:
    def workspace(tokens: int) -> float:
        return head_workspace(SEVEN, Layout(1, tokens), 2, "te", chunk=1024, sign_norms=False)

    assert workspace(1 << 20) - workspace(1 << 14) < 64 * (1 << 20)  # a few vectors


@settings(max_examples=25)
@given(tensor=st.sampled_from([1, 2, 4]), pipeline=st.sampled_from([1, 2]), mib=st.sampled_from([64, 512, 4096]))
def test_push_buckets_are_what_the_plan_of_a_push_holds(tensor: int, pipeline: int, mib: int) -> None:
    shape = replace(SEVEN, num_layers=4)
    config = config_of(rollout={"push_bucket_mib": mib})
    planned = push_bytes(config, shape, Layout(tensor * pipeline, 1024, tensor=tensor, pipeline=pipeline), 2)
    exact = plan_push(shape, tensor=tensor, pipeline=pipeline, virtual_pipeline=1, element_bytes=2, bucket_bytes=mib << 20).extra_bytes
    assert exact <= planned <= 1.5 * exact


def test_what_does_not_fit_is_named_with_the_bytes_and_their_reason() -> None:
    found = memory_of(config_of(), SEVEN, 1, "h100")
    assert found.problem.startswith(f"does not fit: {(found.peak - found.capacity) / GIB:.1f} GiB over 79 GiB at the ")
    assert "because of optimizer 85.1, " in found.problem


def test_an_engine_without_room_for_one_sequence_does_not_fit() -> None:
    small = {"parallel": {"distributed_optimizer": True}, "training": {"recompute": "full"}}
    found = memory_of(config_of(rollout={"gpu_memory_utilization": 0.12}, **small), SEVEN, 8)
    assert found.peak < found.capacity
    assert "over what rollout.gpu_memory_utilization leaves the KV cache, because one sequence of 4095 tokens" in found.problem


def test_servers_have_gpus_of_their_own() -> None:
    servers = {"mode": "server", "servers": ["http://a:1", "http://b:1"], "tensor_parallel": 2}
    config = config_of(rollout=servers)
    assert trainer_gpus(config, 8) == 4
    with pytest.raises(UserError, match=r"--gpus 4: rollout\.servers and rollout\.tensor_parallel take 4 of them"):
        trainer_gpus(config, 4)
    found = memory_of(config, SEVEN, 4)
    assert not any(name.startswith("engine") for name in found.parts) and found.engine.cached_tokens > 0
    fitting = {"parallel": {"distributed_optimizer": True}, "training": {"recompute": "full"}}
    small = memory_of(config_of(rollout=servers | {"gpu_memory_utilization": 0.06}, **fitting), SEVEN, 4)
    assert "over what rollout.gpu_memory_utilization leaves the KV cache of a server's GPU, because" in small.problem


def test_ppo_holds_a_second_model_and_a_kl_term_the_reference_on_the_host() -> None:
    plain, ppo = (memory_of(config_of(objective={"name": name}), SEVEN, 8) for name in ("reinforce", "ppo"))
    assert ppo.parts["critic gradients"][0] == pytest.approx(plain.parts["gradients"][0], rel=0.1)
    assert plain.host == 0
    assert memory_of(config_of(objective={"name": "grpo", "kl_coefficient": 1e-3}), SEVEN, 8).host == plain.parts["weights"][0]


def test_a_model_that_is_not_there_and_not_known_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.path=.*nothing.*`plan` knows Qwen2\.5-7B, "):
        model_shape(str(tmp_path / "nothing"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="model_type=None is not supported"):
        model_shape(str(tmp_path))


def test_a_gpu_that_is_not_known_is_an_error() -> None:
    with pytest.raises(UserError, match="--gpu v100: known are h100, h200, cpu"):
        find_gpu("v100")


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("offload", ["none", "optimizer", "all"])
def test_what_sleeps_or_is_offloaded_is_there_when_it_is_needed(level: int, offload: str) -> None:
    config = config_of(parallel={"distributed_optimizer": True})
    rollout = config.rollout.model_copy(update={"sleep_level": level})
    training = config.training.model_copy(update={"offload": offload})
    found = memory_of(config.model_copy(update={"rollout": rollout, "training": training}), SEVEN, 8)
    plain = memory_of(config, SEVEN, 8)
    update, push, sampling = range(len(MOMENTS))
    engine = sum(sizes[sampling] for name, sizes in found.parts.items() if name.startswith("engine"))
    assert found.total(update) == pytest.approx(plain.total(update) - (engine if level else 0))
    assert found.parts["weights"][push] == found.parts["weights"][update] > 0
    assert found.parts["engine weights"][push] == found.parts["engine weights"][sampling] > 0
    gone = ["optimizer", "gradients"] if offload != "none" else []
    gone += ["weights"] if offload == "all" else []
    assert found.total(sampling) == pytest.approx(plain.total(sampling) - sum(plain.parts[name][sampling] for name in gone))
    moved = sum(plain.parts[name][update] for name in gone if name != "gradients")
    assert found.host == pytest.approx(moved + (plain.parts["engine weights"][update] if level == 1 else 0))
