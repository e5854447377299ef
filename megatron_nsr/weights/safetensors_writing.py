"""Writes safetensors files tensor by tensor: the header comes first, so that no file need be held in memory.

May import: torch, weights.sliced_writes. Format: 8 bytes with the header's length, the header in JSON, the tensors' bytes one after
another (huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_nsr.weights.sliced_writes import write_sliced

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """A tensor without its values. dtype: safetensors' name of it, such as BF16."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def config_of_dtype(config_json: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A config.json whose weights are of that dtype, which may not be the one that they were read in: transformers goes by what it says."""
    name = str(dtype).removeprefix("torch.")
    return dict(config_json) | {key: name for key in ("dtype", "torch_dtype") if config_json.get(key)}


def header_of(name: str, tensor: Tensor) -> TensorHeader:
    """The tensor's header. Raises KeyError for a dtype that no model of ours has."""
    return TensorHeader(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


def plan_files(headers: Iterable[TensorHeader], max_file_bytes: int) -> list[list[TensorHeader]]:
    """Tensors in order over files of at most `max_file_bytes`, or of one tensor."""
    files: list[list[TensorHeader]] = []
    room = 0
    for header in headers:
        if not files or header.bytes > room:
            files.append([])
            room = max_file_bytes
        files[-1].append(header)
        room -= header.bytes
    return files


def file_names(count: int) -> list[str]:
    """One file has Hugging Face's plain name, several are numbered."""
    return [SINGLE_FILE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def write_safetensors(path: Path, headers: Sequence[TensorHeader], tensors: Iterable[Tensor]) -> None:
    """Writes one file; each tensor is asked for when its turn comes, and must be as its header says."""
    with path.open("wb") as file:
        file.write(_header(headers))
        for header, tensor in zip(headers, tensors, strict=True):
            if header_of(header.name, tensor) != header:
                raise ValueError(f"{header.name} is {tensor.dtype} {tuple(tensor.shape)}, not {header.dtype} {header.shape}")
            write_sliced(file, tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def write_index(directory: Path, files: Sequence[Sequence[TensorHeader]]) -> None:
    """The index of several files; one file needs none."""
    if len(files) > 1:
        weight_map = {header.name: name for name, headers in zip(file_names(len(files)), files, strict=True) for header in headers}
        total = sum(header.bytes for headers in files for header in headers)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _header(headers: Sequence[TensorHeader]) -> bytes:
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for header in headers:
        start, end = end, end + header.bytes
        described[header.name] = {"dtype": header.dtype, "shape": list(header.shape), "data_offsets": [start, end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8 bytes
    return struct.pack("<Q", len(text)) + text
