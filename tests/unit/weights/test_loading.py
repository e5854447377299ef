from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_nsr.models.hf_config import ModelShape, read_model_shape
from megatron_nsr.weights.loading import random_hf_tensors
from tests.tiny_models import tiny_config


def tiny_shape(tmp_path: Path, **fields: object) -> ModelShape:
    tiny_config("qwen3", tied=False, **fields).save_pretrained(tmp_path)
    return read_model_shape(str(tmp_path))


def test_random_weights_depend_on_the_seed_and_follow_the_configured_spread(tmp_path: Path) -> None:
    shape = tiny_shape(tmp_path, initializer_range=0.05)
    first, again, other = (random_hf_tensors(shape, seed) for seed in (0, 0, 1))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first["model.layers.1.mlp.up_proj.weight"])
    assert first[name].std().item() == pytest.approx(0.05, rel=0.05)
    assert first["model.layers.0.self_attn.q_norm.weight"].eq(1).all()
