from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from megatron_nsr.models.hf_config import read_model_shape
from megatron_nsr.types import UserError
from megatron_nsr.weights.loading import random_hf_tensors
from megatron_nsr.weights.safetensors_files import INDEX_FILE, SINGLE_FILE, SafetensorsDirectory, write_hf_directory
from megatron_nsr.weights.safetensors_writing import config_of_dtype
from tests.tiny_models import tiny_config

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.zeros(1)}


def views_of_one_buffer() -> Iterator[tuple[str, torch.Tensor]]:
    """As a gathering yields them: the buffer is overwritten once the next tensor is asked for."""
    buffer = torch.empty(6)
    for name, tensor in TENSORS.items():
        if tensor.dtype == buffer.dtype:
            yield name, buffer[: tensor.numel()].copy_(tensor.flatten()).view(tensor.shape)
            buffer.fill_(float("nan"))
        else:
            yield name, tensor


@pytest.mark.parametrize(("max_file_bytes", "files"), [(1 << 20, 1), (25, 2), (1, 3)])
def test_what_is_written_reads_back_bitwise(tmp_path: Path, max_file_bytes: int, files: int) -> None:
    write_hf_directory(tmp_path / "model", views_of_one_buffer(), {"model_type": "qwen3"}, max_file_bytes=max_file_bytes)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == files
    assert (tmp_path / "model" / INDEX_FILE).is_file() == (files > 1)
    with SafetensorsDirectory(str(tmp_path / "model")) as found:
        assert set(found) == set(TENSORS)
        assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items())


def test_transformers_loads_what_is_written(tmp_path: Path) -> None:
    config = tiny_config("qwen3", tied=True, layers=2)
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(tmp_path / "source")
    weights = random_hf_tensors(read_model_shape(str(tmp_path / "source")), seed=0)
    write_hf_directory(tmp_path / "model", weights.items(), config.to_dict(), max_file_bytes=20_000)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    state = model.state_dict()
    assert all(torch.equal(state[name], weights[name]) for name in weights)


def test_tokenizer_files_are_copied_and_an_old_directory_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    (tmp_path / "source" / "notes.txt").write_text("not ours")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "stale.safetensors").write_text("old")
    write_hf_directory(tmp_path / "model", TENSORS.items(), {"model_type": "qwen3"}, copy_from=tmp_path / "source")
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == ["config.json", SINGLE_FILE, "tokenizer.json"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "source"]


def test_nothing_appears_under_the_name_when_writing_fails(tmp_path: Path) -> None:
    def breaking() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", TENSORS["a"]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_hf_directory(tmp_path / "model", breaking(), {})
    assert not (tmp_path / "model").exists()


def test_a_rank_that_does_not_write_still_exhausts_the_iterator(tmp_path: Path) -> None:
    tensors = views_of_one_buffer()
    write_hf_directory(tmp_path / "model", tensors, {}, writer=False)
    assert next(tensors, None) is None and not list(tmp_path.iterdir())


def write_sharded(tmp_path: Path) -> str:
    write_hf_directory(tmp_path / "model", TENSORS.items(), {}, max_file_bytes=1)
    return str(tmp_path / "model")


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.path=.*: no file model\.safetensors"):
        SafetensorsDirectory(str(tmp_path))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    path = write_sharded(tmp_path)
    (Path(path) / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.path=.*: no file model-00002-of-00003\.safetensors"):
        SafetensorsDirectory(path)


@pytest.mark.parametrize("kept", [0, 5, -1])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    path = write_sharded(tmp_path)
    file = Path(path) / "model-00001-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"model-00001-of-00003\.safetensors is damaged or cut short"):
        SafetensorsDirectory(path)


def test_a_tensor_that_the_index_promises_but_no_file_holds(tmp_path: Path) -> None:
    path = write_sharded(tmp_path)
    index = json.loads((Path(path) / INDEX_FILE).read_text())
    index["weight_map"]["d"] = index["weight_map"]["a"]
    (Path(path) / INDEX_FILE).write_text(json.dumps(index))
    with SafetensorsDirectory(path) as found, pytest.raises(UserError, match=r"00001-of-00003\.safetensors: tensor d cannot be read"):
        found["d"]
    with SafetensorsDirectory(path) as found, pytest.raises(UserError, match="no tensor e in its safetensors files"):
        found["e"]


@pytest.mark.parametrize("text", ["", "[]", '{"metadata": {}}', '{"weight_map": 3}'])
def test_a_broken_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json is no index"):
        SafetensorsDirectory(str(tmp_path))


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_an_exported_config_says_the_dtype_of_its_weights(key: str) -> None:
    """transformers loads weights in what config.json says: fp32 weights under "bfloat16" would be rounded silently."""
    config = {"hidden_size": 8, key: "bfloat16"}
    assert config_of_dtype(config, torch.float32) == {"hidden_size": 8, key: "float32"}
    assert config_of_dtype({"hidden_size": 8, key: None}, torch.float32) == {"hidden_size": 8, key: None}
