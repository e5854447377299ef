"""A checkpoint of any layout to a Hugging Face directory.

May import: models, weights, training.checkpoint_files, platform, conversion, types; no megatron-core.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_nsr.conversion.parts import Part, make_folder
from megatron_nsr.models.hf_config import ModelShape, read_model_shape
from megatron_nsr.platform.model_files import copy_tokenizer, read_json
from megatron_nsr.training.checkpoint_files import RUN_FILE, is_checkpoint, read_description
from megatron_nsr.types import UserError
from megatron_nsr.weights.checkpoint_pieces import check_checkpoint, read_entry
from megatron_nsr.weights.mapping import Entry, hf_tensor_shape, whole_model_entries
from megatron_nsr.weights.safetensors_writing import (
    DTYPE_NAMES,
    DTYPES,
    TensorHeader,
    config_of_dtype,
    file_names,
    plan_files,
    write_index,
    write_safetensors,
)
from megatron_nsr.weights.torch_dist_files import TorchDistReader


def open_checkpoint(path: Path) -> tuple[TorchDistReader, ModelShape, dict[str, Any]]:
    """A complete checkpoint's weights, its model's shape and its description. Raises UserError naming what is missing or does not fit."""
    if not is_checkpoint(path):
        raise UserError(f"{path}: not a checkpoint; give a folder that `import` made, or RUN/checkpoints/step_N")
    description = read_description(path)
    shape = read_model_shape(str(path))
    reader = TorchDistReader(path / "state")
    check_checkpoint(reader, shape)
    return reader, shape, description


def export_hf(source: Path, target: Path, max_file_bytes: int) -> None:
    """Writes the weights of the checkpoint `source` as the Hugging Face directory `target`, in files of at most that size or one tensor.

    Memory: one parameter, whole, and a piece of it. Raises UserError naming what is wrong with the input, and OutputError.
    """
    reader, shape, description = open_checkpoint(source)
    holders = {name: (layer, entry) for layer, entry in whole_model_entries(shape) for name in entry.hf}
    headers = [TensorHeader(name, _dtype(reader, entry), hf_tensor_shape(name, shape)) for name, (_, entry) in holders.items()]
    files = plan_files(headers, max_file_bytes)

    def maker(file: str, held: Sequence[TensorHeader]) -> Callable[[Path], Any]:
        def make(content: Path) -> bool:
            write_safetensors(content / file, held, _values(reader, shape, [(*holders[header.name], header.name) for header in held]))
            return True

        return make

    def finish(content: Path, _results: list[Any]) -> None:
        write_index(content, files)
        config = _config(source, {header.dtype for header in headers})
        (content / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copy_tokenizer(source, content)

    named = zip(file_names(len(files)), files, strict=True)
    parts = [Part(file, file, sum(header.bytes for header in held), maker(file, held)) for file, held in named]
    written = (source / RUN_FILE).stat().st_mtime_ns
    request = {"export": str(source.resolve()), "written": written, "files": description["files"], "max_file_bytes": max_file_bytes}
    make_folder(target, request, parts, finish, title="export")


def _values(reader: TorchDistReader, shape: ModelShape, wanted: list[tuple[int | None, Entry, str]]) -> Iterator[Tensor]:
    """The tensors in order; a parameter of several is read once."""
    for (layer, entry), group in groupby(wanted, key=lambda item: item[:2]):
        tensors = dict(zip(entry.hf, read_entry(reader, layer, entry, shape), strict=True))
        for *_, name in group:
            yield tensors.pop(name)


def _dtype(reader: TorchDistReader, entry: Entry) -> str:
    dtype = reader.dtype(entry.checkpoint_key)
    if dtype not in DTYPE_NAMES:
        raise UserError(f"checkpoint {reader.directory}: {entry.checkpoint_key} has dtype {dtype}; only {', '.join(DTYPE_NAMES.values())}")
    return DTYPE_NAMES[dtype]


def _config(source: Path, dtypes: set[str]) -> dict[str, Any]:
    """The checkpoint's config.json; a dtype in it becomes that of all weights, where they have one."""
    config = read_json(source, "config.json") or {}
    return config_of_dtype(config, DTYPES[next(iter(dtypes))]) if len(dtypes) == 1 else config
