"""A real vLLM engine with a tiny tied Qwen3 on CPU: one program run (vllm_engine_program.py), judged by many tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("vllm_engine_program.py")
Seen = dict[str, Any]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    out = tmp_path_factory.mktemp("vllm_engine")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(PROGRAM.parents[2]), *sys.path])}
    run = subprocess.run([sys.executable, str(PROGRAM), str(out)], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads((out / "seen.json").read_text())


def test_generating_before_the_first_push_is_an_error(seen: Seen) -> None:
    assert seen["no_weights"] == "RuntimeError: the rollout engine has no weights yet: push them before generating"
    assert seen["version_before"] is None


def test_logprobs_equal_the_hf_models(seen: Seen) -> None:
    assert seen["gap_first"] < 1e-4
    assert seen["gap_long_first"] < 1e-4


def test_logprobs_after_a_second_push_equal_the_new_models(seen: Seen) -> None:
    assert seen["version"] == 2
    assert seen["gap_new"] < 1e-4


def test_a_push_forgets_the_cached_prefixes_of_the_old_weights(seen: Seen) -> None:
    assert seen["gap_long_cached"] < 1e-4
    assert seen["gap_long_new"] < 1e-4
    assert seen["models_differ"] > 0.1  # so that a stale cache would show


def test_an_incomplete_push_is_an_error_and_leaves_no_usable_weights(seen: Seen) -> None:
    assert seen["incomplete"] == "RuntimeError: pushed weights lack 1 of 25 tensors: model.layers.1.self_attn.k_proj.weight"
    assert "no weights yet" in seen["after_incomplete"]


def test_a_refused_push_is_consumed_to_its_end(seen: Seen) -> None:
    assert seen["incomplete_left"] == seen["padded_left"] == 0


def test_unknown_and_padded_tensors_are_refused(seen: Seen) -> None:
    assert "model.layers.9.mlp.up_proj.weight is no weight of the model" in seen["unknown"]
    assert "model.embed_tokens.weight has 320 rows, not vocab_size=160" in seen["padded"]


def test_an_engine_that_slept_through_an_update_samples_from_the_push(seen: Seen) -> None:
    assert (seen["version_asleep_1"], seen["version_asleep_2"]) == (2, None)
    assert seen["same_after_1"] and seen["same_after_2"]


def test_a_push_tells_the_bytes_it_brought(seen: Seen) -> None:
    assert seen["pushed_bytes"] == seen["model_bytes"]


def test_what_the_engine_holds_is_what_was_pushed(seen: Seen) -> None:
    assert seen["right"] == seen["recovered"] == []


def test_one_wrong_bit_and_rows_in_the_wrong_place_are_found_and_named(seen: Seen) -> None:
    assert len(seen["spoiled"]) == 5
    for name, wrong in seen["spoiled"].items():
        # the head is tied, and the engine holds it as a tensor of its own
        assert wrong == (["lm_head.weight", name] if "embed" in name else [name])
    assert seen["rolled"] == ["model.layers.1.self_attn.k_proj.weight"]


def test_a_layer_that_goes_on_with_old_packed_weights_is_found(seen: Seen) -> None:
    assert seen["before_stale"] == []
    assert seen["stale"] == ["model.layers.0.mlp.down_proj.weight"]


def test_an_engine_in_fp8_holds_every_push_rounded(seen: Seen) -> None:
    assert seen["fp8_right_0"] == seen["fp8_right_1"] == seen["fp8_after_sleep"] == []
    assert seen["fp8_same"]


def test_a_wrong_push_of_an_engine_in_fp8_is_found_and_named(seen: Seen) -> None:
    assert seen["fp8_spoiled"] == ["model.layers.1.self_attn.k_proj.weight"]
    assert len(seen["fp8_other"]) == 25


def test_a_head_in_bfloat16_is_checked_where_its_logits_are_formed(seen: Seen) -> None:
    wrong, sampled_the_same = seen["fp8_spoiled_head"]
    assert wrong == ["lm_head.weight"] and not sampled_the_same


def test_an_engine_in_fp8_samples_from_its_weights_and_not_exactly(seen: Seen) -> None:
    assert 1e-3 < seen["fp8_gap"] < seen["fp8_gap_of_other"] / 2


def test_logprobs_at_another_temperature_are_the_tempered_ones(seen: Seen) -> None:
    assert seen["gap_tempered"] < 1e-4
    assert seen["gap_tempered_raw"] > 0.1


def test_the_same_seeds_give_the_same_tokens(seen: Seen) -> None:
    assert seen["again"] == seen["plain"]


def test_tokens_do_not_depend_on_order_and_batching(seen: Seen) -> None:
    assert seen["halves"] == seen["plain"][4:] + seen["plain"][:4]


def test_the_samples_of_one_request_are_those_of_consecutive_seeds(seen: Seen) -> None:
    assert seen["grouped"] == seen["single"]
    assert len({tuple(ids) for ids in seen["grouped"]}) == 3


def test_greedy_sampling_ignores_the_seed(seen: Seen) -> None:
    assert seen["greedy_same"][0] == seen["greedy_same"][1]


def test_the_models_generation_config_and_its_end_id_are_ignored(seen: Seen) -> None:
    assert {len(ids) for ids in seen["plain"]} == {12}
    assert any(7 in ids for ids in seen["plain"])
    assert set(seen["plain_reasons"]) == {"length"}


def test_a_response_ends_at_the_first_of_several_stop_ids_and_keeps_it(seen: Seen) -> None:
    stops = set(seen["stops"])
    for plain, stopped, reason in zip(seen["plain"], seen["stopped"], seen["stopped_reasons"], strict=True):
        end = next((i for i, token in enumerate(plain) if token in stops), None)
        assert stopped == (plain if end is None else plain[: end + 1])
        assert reason == ("length" if end is None else "stop")
    ends = {stopped[-1] for stopped, reason in zip(seen["stopped"], seen["stopped_reasons"], strict=True) if reason == "stop"}
    assert len(ends) > 1


def test_a_response_that_fills_the_model_length_is_truncated(seen: Seen) -> None:
    assert seen["fills_model_len"] == [3, "length"]


def test_a_prompt_without_room_for_a_response_is_refused(seen: Seen) -> None:
    assert seen["too_long"] == "ValueError: a prompt of 192 tokens: 1 to 191 fit max_model_len"


def test_more_prompt_tokens_than_one_pass_takes_are_sampled_with_seeds(seen: Seen) -> None:
    assert seen["many_prompt_tokens"] == 120


def test_arrays_have_their_documented_types(seen: Seen) -> None:
    assert seen["dtypes"] == ["int32", "float32"]


def test_the_callers_random_state_is_untouched(seen: Seen) -> None:
    assert seen["start_left_state"] and seen["use_left_state"]


def test_a_closed_engine_leaves_the_process_group_usable_and_samples_no_more(seen: Seen) -> None:
    assert seen["group_after_close"] == [1.0, 1.0]
    assert seen["after_close"].startswith("RuntimeError")
