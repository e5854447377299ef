"""The process state that a rollout engine must leave as it was, and the layout check that needs no engine."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_nsr.rollout.vllm_engine import check_tensor_parallel
from megatron_nsr.rollout.vllm_environment import caller_state_kept, default_process_group_kept, prepare_environment
from megatron_nsr.types import UserError


def test_the_callers_random_numbers_continue_where_they_were() -> None:
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    with caller_state_kept():
        torch.manual_seed(9), np.random.seed(9), random.seed(9)
        torch.rand(3), np.random.rand(3), random.random()
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected


def test_the_number_of_threads_can_still_be_set_after_an_error() -> None:
    original = torch.set_num_threads
    with pytest.raises(RuntimeError, match="start failed"), caller_state_kept():
        torch.set_num_threads = lambda count: None
        raise RuntimeError("start failed")
    assert torch.set_num_threads is original


def test_only_the_default_process_group_survives() -> None:
    if dist.is_initialized():  # left by another test of this process
        dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.new_group([0])
        with default_process_group_kept():
            dist.destroy_process_group()
            dist.destroy_process_group(group)
        assert dist.is_initialized()
        with pytest.raises(ValueError, match="Invalid process group"):
            dist.destroy_process_group(group)
    finally:
        dist.destroy_process_group()
    assert not dist.is_initialized()


def test_a_users_own_variables_win_except_the_one_the_engine_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("VLLM_NO_USAGE_STATS", raising=False)
    prepare_environment(on_cpu=False, in_process=True)
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"


def test_ranks_that_do_not_fill_the_world_are_refused() -> None:
    with pytest.raises(UserError, match=r"rollout\.tensor_parallel=3 does not divide the number of processes, 4"):
        check_tensor_parallel(3, world_size=4, attention_heads=12)


def test_heads_that_cannot_be_split_are_refused() -> None:
    with pytest.raises(UserError, match=r"rollout\.tensor_parallel=4 does not divide num_attention_heads=14"):
        check_tensor_parallel(4, world_size=8, attention_heads=14)


def test_a_fitting_layout_is_accepted() -> None:
    check_tensor_parallel(2, world_size=4, attention_heads=14)
