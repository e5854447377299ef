"""What `megatron-nsr serve` tells vLLM's server of rollout.quantization."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_nsr.config import Config
from megatron_nsr.config_files import parse_config
from megatron_nsr.rollout import serve
from megatron_nsr.types import UserError
from tests.tiny_models import tiny_config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    tiny_config("qwen3", tied=False).save_pretrained(tmp_path)
    return parse_config(
        {
            "run": {"dir": "unused", "steps": 1},
            "model": {"path": str(tmp_path)},
            "data": {"template": "plain", "prompts_per_step": 1},
            "objective": {"name": "nsr", "mini_batch_prompts": 1},
            "rollout": {"quantization": "fp8"},
        }
    )


@pytest.mark.parametrize(("version", "on_cpu"), [("0.32.0", True), ("0.26.0", False)])
def test_a_server_rounds_as_its_config_says(config: Config, monkeypatch: pytest.MonkeyPatch, version: str, on_cpu: bool) -> None:
    monkeypatch.setattr(serve, "_vllm_version", lambda: version)
    arguments = serve.server_arguments(config, on_cpu=on_cpu)
    assert arguments[arguments.index("--quantization") + 1] == "fp8_per_channel"


def test_a_vllm_that_cannot_round_here_is_named(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_vllm_version", lambda: "0.26.0+cpu")
    with pytest.raises(
        UserError, match=r"^rollout\.quantization=fp8: vLLM 0\.26\.0\+cpu rounds weights on a GPU only, 0\.32 on a CPU too$"
    ):
        serve.server_arguments(config, on_cpu=True)
