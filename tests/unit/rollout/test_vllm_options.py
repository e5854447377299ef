"""rollout.quantization: refused where vLLM cannot round, or where nobody would notice a wrong push."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_nsr.config import Config
from megatron_nsr.config_files import parse_config
from megatron_nsr.rollout.vllm_options import check_allocator, check_quantization
from megatron_nsr.types import UserError


def config_of(**rollout: Any) -> Config:
    return parse_config(
        {
            "run": {"dir": "unused", "steps": 1},
            "model": {"path": "unused"},
            "data": {"template": "plain", "prompts_per_step": 1},
            "objective": {"name": "nsr", "mini_batch_prompts": 1},
            "rollout": rollout,
        }
    )


@pytest.mark.parametrize(
    ("rollout", "experts", "expected"),
    [
        ({"verify_push": "never"}, True, "rollout.quantization=fp8: vLLM rounds the weights of experts on a GPU only"),
        (
            {"tensor_parallel": 2},
            False,
            "holds of rollout.tensor_parallel=2 cannot be compared with the policy; set rollout.verify_push=never",
        ),
    ],
)
def test_what_cannot_be_is_refused_on_a_cpu(rollout: dict[str, Any], experts: bool, expected: str) -> None:
    with pytest.raises(UserError) as refused:
        check_quantization(config_of(quantization="fp8", **rollout), experts=experts, on_cpu=True)
    assert expected in str(refused.value)
    check_quantization(config_of(**rollout), experts=experts, on_cpu=True)


def test_an_unverified_push_has_to_be_asked_for() -> None:
    with pytest.raises(UserError, match="holds of a model with experts cannot be compared with the policy"):
        check_quantization(config_of(quantization="fp8"), experts=True, on_cpu=False)
    for fine, experts in (({"verify_push": "never", "tensor_parallel": 2}, True), ({}, False)):
        check_quantization(config_of(quantization="fp8", **fine), experts=experts, on_cpu=False)


def test_a_sleeping_engine_must_see_that_segments_expand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    check_allocator()
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64,expandable_segments:True")
    with pytest.raises(UserError, match=r"^PYTORCH_ALLOC_CONF=max_split_size_mb:64,expandable_segments:True: .*rename it, or leave"):
        check_allocator()
