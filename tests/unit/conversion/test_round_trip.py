"""Import and export give every bit back, at every layout, and transformers loads the result as it loads the source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_nsr.config import ParallelConfig
from megatron_nsr.conversion.exporting import export_hf
from megatron_nsr.conversion.importing import import_hf
from megatron_nsr.conversion.verifying import differences
from megatron_nsr.training.checkpoint_files import is_checkpoint, read_description
from megatron_nsr.weights.safetensors_files import SafetensorsDirectory
from tests.tiny_models import LLAMA3_ROPE, tiny_config, tiny_model

MODELS: dict[str, dict[str, Any]] = {
    "qwen2_tied": {"family": "qwen2", "tied": True},
    "qwen2_untied": {"family": "qwen2", "tied": False},
    "qwen3_tied": {"family": "qwen3", "tied": True},
    "qwen3_untied": {"family": "qwen3", "tied": False},
    "llama_tied": {"family": "llama", "tied": True},
    "llama_rope_untied": {"family": "llama", "tied": False, "rope_parameters": LLAMA3_ROPE},
    "qwen3_moe_untied": {"family": "qwen3_moe", "tied": False},
}
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 2, 2)]
CASES = [(model, layout, expert) for model in MODELS for layout in LAYOUTS for expert in ((1, 2) if "moe" in model else (1,))]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bf16 models as transformers saves them, each in several files, with a tokenizer's file beside them."""
    folder = tmp_path_factory.mktemp("sources")
    for name, fields in MODELS.items():
        model = tiny_model(tiny_config(**fields)).to(torch.bfloat16)
        model.save_pretrained(folder / name, max_shard_size="100KB")
        (folder / name / "tokenizer.json").write_text('{"model": {}}')
    return folder


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    with SafetensorsDirectory(str(path)) as files:
        return {name: files[name].clone() for name in files}


@pytest.mark.parametrize(("model", "layout", "expert"), CASES)
def test_every_bit_comes_back(sources: Path, tmp_path: Path, model: str, layout: tuple[int, int, int], expert: int) -> None:
    tensor, pipeline, virtual = layout
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, expert=expert)
    import_hf(sources / model, tmp_path / "checkpoint", parallel)
    assert is_checkpoint(tmp_path / "checkpoint") and differences(tmp_path / "checkpoint", sources / model) == []
    ranks = {file.name.split("_")[2] for file in (tmp_path / "checkpoint" / "state").glob("*.distcp")}
    assert ranks == {str(rank) for rank in range(max(tensor, expert) * pipeline)}
    export_hf(tmp_path / "checkpoint", tmp_path / "exported", max_file_bytes=100_000)
    before, after = tensors_of(sources / model), tensors_of(tmp_path / "exported")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype and torch.equal(after[name].view(torch.int16), value.view(torch.int16)), name
    for file in ("config.json", "generation_config.json", "tokenizer.json"):
        assert json.loads((tmp_path / "exported" / file).read_text()) == json.loads((sources / model / file).read_text())


@pytest.mark.parametrize("model", MODELS)
def test_transformers_computes_the_same_from_the_export(sources: Path, tmp_path: Path, model: str) -> None:
    import_hf(sources / model, tmp_path / "checkpoint", ParallelConfig(tensor=2, pipeline=2))
    export_hf(tmp_path / "checkpoint", tmp_path / "exported", max_file_bytes=100_000)
    assert len(list((tmp_path / "exported").glob("*.safetensors"))) > 1
    source, exported = (transformers.AutoModelForCausalLM.from_pretrained(path) for path in (sources / model, tmp_path / "exported"))
    assert all(torch.equal(value, exported.state_dict()[name]) for name, value in source.state_dict().items())
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(source(tokens).logits, exported(tokens).logits)


def test_special_values_keep_their_bits(tmp_path: Path) -> None:
    model = tiny_model(tiny_config("qwen3", tied=False, layers=2)).to(torch.bfloat16)
    weight = model.model.layers[1].mlp.up_proj.weight.data
    weight[0, :4] = torch.tensor([float("nan"), -0.0, float("inf"), 1e-40])
    model.save_pretrained(tmp_path / "source")
    import_hf(tmp_path / "source", tmp_path / "checkpoint", ParallelConfig(tensor=2))
    assert differences(tmp_path / "checkpoint", tmp_path / "source") == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_model(tiny_config("llama", tied=True, layers=2)).to(dtype).save_pretrained(tmp_path / "source")
    import_hf(tmp_path / "source", tmp_path / "checkpoint", ParallelConfig())
    export_hf(tmp_path / "checkpoint", tmp_path / "exported", max_file_bytes=1 << 30)
    assert {value.dtype for value in tensors_of(tmp_path / "exported").values()} == {dtype}
    assert differences(tmp_path / "checkpoint", tmp_path / "exported") == []


def test_the_description_says_where_the_checkpoint_is_from(sources: Path, tmp_path: Path) -> None:
    import_hf(sources / "qwen2_tied", tmp_path / "checkpoint", ParallelConfig(tensor=2))
    description = read_description(tmp_path / "checkpoint")
    assert description["imported_from"] == str((sources / "qwen2_tied").resolve())
    assert description["layout"] == {"tensor": 2, "pipeline": 1, "virtual_pipeline": 1, "expert": 1}


def test_a_difference_is_named(sources: Path, tmp_path: Path) -> None:
    import_hf(sources / "qwen3_tied", tmp_path / "checkpoint", ParallelConfig(tensor=2))
    model = tiny_model(tiny_config(**MODELS["qwen3_tied"])).to(torch.bfloat16)
    model.model.layers[2].self_attn.k_proj.weight.data[3, 5] += 1
    model.save_pretrained(tmp_path / "other")
    (line,) = differences(tmp_path / "checkpoint", tmp_path / "other")
    assert line.startswith("model.layers.2.self_attn.k_proj.weight: 1 of 4096 values differ, by at most 1")
