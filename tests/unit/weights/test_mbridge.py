"""mbridge, another project's mapping between Hugging Face and megatron-core, agrees on every name and on every shard's values.

Its methods for one tensor are called without a model: they begin with an underscore, hence the exact version in the lock files.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mbridge.core.parallel_states import ParallelStates
from mbridge.models import LLaMABridge, Qwen2Bridge, Qwen3Bridge, Qwen3MoEBridge

from megatron_nsr.models.hf_config import read_model_shape
from megatron_nsr.weights.mapping import hf_tensor_shape, whole_model_entries
from tests.tiny_models import tiny_config

BRIDGES = {"qwen2": Qwen2Bridge, "qwen3": Qwen3Bridge, "llama": LLaMABridge, "qwen3_moe": Qwen3MoEBridge}


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("family", BRIDGES)
def test_names_and_layouts_are_those_of_mbridge(tmp_path_factory: pytest.TempPathFactory, family: str, tensor: int) -> None:
    path = tmp_path_factory.mktemp(family)
    config = tiny_config(family, tied=False, layers=2)
    config.save_pretrained(path)
    shape, bridge = read_model_shape(str(path)), bridge_of(family, config, tensor)
    compared = set()
    for layer, entry in whole_model_entries(shape):
        name = (entry.te_name or entry.megatron).format(layer=layer, expert=entry.expert)  # mbridge knows the te backend's names
        assert bridge._weight_name_mapping_mcore_to_hf(name) == list(entry.hf)
        tensors = [torch.randn(hf_tensor_shape(hf, shape)) for hf in entry.hf]
        ranks = tensor if entry.expert is None else 1  # experts are whole on their rank
        whole = bridge._weight_to_mcore_format(name, tensors)
        ours = [entry.layout.split(tensors, rank, ranks, shape) for rank in range(ranks)]
        theirs = bridge._weight_split_across_tp(name, whole, ours[0], ranks)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), name
        names, back = bridge._weight_to_hf_format(name, whole)
        assert names == list(entry.hf)
        assert all(torch.equal(a, b) for a, b in zip(back, entry.layout.join(ours, shape), strict=True)), name
        compared.update(entry.hf)
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} < compared


def bridge_of(family: str, config: Any, tensor: int) -> Any:
    """A bridge for that many ranks, which pads the odd vocabulary as we do. It never sees a model or a process group."""
    bridge = BRIDGES[family](config, torch.float32, ParallelStates(tp_size=tensor), make_vocab_size_divisible_by=tensor)
    bridge.vocab_size, bridge.padded_vocab_size = config.vocab_size, -(-config.vocab_size // tensor) * tensor
    return bridge
