"""Two ranks: first one engine over both (external launcher), then an engine each; one torchrun start, judged by many tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("vllm_engines_program.py")
Seen = dict[str, Any]
SHARED, OWN = "2", "1"


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    out = tmp_path_factory.mktemp("vllm_engines")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(PROGRAM.parents[2]), *sys.path])}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run([*torchrun, str(PROGRAM), str(out), SHARED, OWN], env=environment, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads((out / "seen.json").read_text())


@pytest.mark.parametrize("layout", [SHARED, OWN])
def test_logprobs_equal_the_hf_models_after_each_push(seen: Seen, layout: str) -> None:
    assert len(seen[layout]["gaps"]) == 2
    assert max(seen[layout]["gaps"]) < 1e-4


@pytest.mark.parametrize("layout", [SHARED, OWN])
def test_every_rank_has_every_trajectory_once_and_in_order(seen: Seen, layout: str) -> None:
    assert seen[layout]["same_on_every_rank"]
    assert [(prompt, sample) for prompt, sample, *_ in seen[layout]["trajectories"]] == [(p, s) for p in range(5) for s in range(3)]


def test_trajectories_do_not_depend_on_the_number_of_engines(seen: Seen) -> None:
    assert seen[SHARED]["trajectories"] == seen[OWN]["trajectories"]


@pytest.mark.parametrize("layout", [SHARED, OWN])
def test_a_trajectory_is_decoded_once(seen: Seen, layout: str) -> None:
    assert seen[layout]["decoded"] == 2 * 15 + 1


@pytest.mark.parametrize("layout", [SHARED, OWN])
def test_fewer_prompts_than_engines_are_fine(seen: Seen, layout: str) -> None:
    assert seen[layout]["one"] == 1


def test_a_closed_engine_leaves_the_process_group_and_room_for_the_next(seen: Seen) -> None:
    assert {SHARED, OWN} <= seen.keys()  # each case ends with collectives after its engine's close


def test_shared_memory_is_unlinked_while_in_use_so_that_a_killed_job_leaves_none(seen: Seen) -> None:
    mapped = seen[SHARED]["shared_memory"]
    assert bool(mapped) is seen[SHARED]["has_shared_memory"]  # vLLM's build for CPUs without AVX-512 has none
    assert all(line.endswith("(deleted)") for line in mapped)


def test_a_verified_push_passes_with_one_kv_head_on_two_ranks_and_a_padded_vocabulary_in_bfloat16(seen: Seen) -> None:
    assert [messages["bytes"] for messages in seen["verified"]["messages"]] == 2 * [2 * [seen["verified"]["model_bytes"]]]


def test_a_bfloat16_engine_forms_logits_in_float32(seen: Seen) -> None:
    assert seen["verified"]["logits"] == "torch.float32"


def test_one_wrong_element_on_any_rank_of_an_engine_is_named_on_all(seen: Seen) -> None:
    first, second = ({name: text for name, text in messages.items() if name != "bytes"} for messages in seen["verified"]["messages"])
    assert first == second and len(first) == 4
    for name, text in first.items():
        assert text == f"push of version 3: 1 tensors in rollout engine 0 are not those of the policy: {name}"


def test_a_group_size_that_does_not_divide_the_world_is_refused(seen: Seen) -> None:
    assert seen["three"] == "rollout.tensor_parallel=3 does not divide the number of processes, 2"
