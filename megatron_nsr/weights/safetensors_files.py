"""Reads and writes Hugging Face model directories: safetensors, config.json and the tokenizer's files.

May import: safetensors, torch, types.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_nsr.platform.model_files import copy_tokenizer
from megatron_nsr.types import UserError
from megatron_nsr.weights.safetensors_writing import (
    INDEX_FILE,
    SINGLE_FILE,
    TensorHeader,
    file_names,
    header_of,
    write_index,
    write_safetensors,
)


class SafetensorsDirectory(Mapping[str, Tensor]):
    """The tensors of a directory by name, each read when asked for. Files stay open until `close()`.

    Raises UserError naming model.path, the file and the tensor for whatever is missing or cut short.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._handles: dict[str, Any] = {}
        self._file_of = self._read_index()
        for file in self.file_names():
            self._open(file)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._file_of:
            raise UserError(f"model.path={self.path}: no tensor {name} in its safetensors files")
        file = self._file_of[name]
        try:
            tensor: Tensor = self._open(file).get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"model.path={self.path}: {file}: tensor {name} cannot be read: {error}") from None
        return tensor

    def header(self, name: str) -> TensorHeader:
        """The tensor's dtype and shape, without reading it."""
        try:
            part = self._open(self._file_of[name]).get_slice(name)
        except SafetensorError as error:
            raise UserError(f"model.path={self.path}: {self._file_of[name]}: tensor {name} cannot be read: {error}") from None
        return TensorHeader(name, part.get_dtype(), tuple(part.get_shape()))

    def file_names(self) -> list[str]:
        """The safetensors files."""
        return sorted(set(self._file_of.values()))

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def __enter__(self) -> SafetensorsDirectory:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._handles.clear()

    def _read_index(self) -> dict[str, str]:
        index = Path(self.path) / INDEX_FILE
        if not index.is_file():
            return dict.fromkeys(self._open(SINGLE_FILE).keys(), SINGLE_FILE)
        try:
            return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"model.path={self.path}: {INDEX_FILE} is no index of safetensors files: {error!r}") from None

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            if not (Path(self.path) / file).is_file():
                raise UserError(f"model.path={self.path}: no file {file}; the model's safetensors files must be complete")
            try:
                self._handles[file] = safe_open(str(Path(self.path) / file), framework="pt")
            except SafetensorError as error:
                raise UserError(f"model.path={self.path}: {file} is damaged or cut short: {error}") from None
        return self._handles[file]


def write_hf_directory(
    path: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    config_json: Mapping[str, Any],
    *,
    copy_from: str | Path | None = None,
    writer: bool = True,
    max_file_bytes: int = 4 << 30,
) -> None:
    """Writes a directory that Hugging Face and vLLM load; it appears under its name only when it is complete.

    tensors: names and whole tensors, in their dtype. Where they are gathered collectively, every rank calls this function and
    exhausts the iterator, but only the rank with `writer` writes.
    copy_from: a directory whose tokenizer files and generation_config.json are copied.
    An existing directory of that name is replaced.
    """
    if not writer:
        for _ in tensors:
            pass
        return
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_tensors(partial, tensors, max_file_bytes)
    (partial / "config.json").write_text(json.dumps(dict(config_json), indent=2) + "\n", encoding="utf-8")
    if copy_from is not None:
        copy_tokenizer(copy_from, partial)
    _replace_directory(partial, target)


def _write_tensors(directory: Path, tensors: Iterable[tuple[str, Tensor]], max_file_bytes: int) -> None:
    """Files of at most `max_file_bytes`, or of one tensor; one file has HF's plain name, several have an index."""
    files: list[list[TensorHeader]] = []
    held: dict[TensorHeader, Tensor] = {}

    def flush() -> None:
        write_safetensors(directory / f"part-{len(files)}", list(held), held.values())
        files.append(list(held))
        held.clear()

    for name, tensor in tensors:
        header = header_of(name, tensor)
        if held and sum(other.bytes for other in held) + header.bytes > max_file_bytes:
            flush()
        # A view of a gathering buffer would drag the whole buffer along, and the buffer is reused.
        held[header] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    flush()
    for i, name in enumerate(file_names(len(files))):
        (directory / f"part-{i}").rename(directory / name)
    write_index(directory, files)


def _replace_directory(partial: Path, target: Path) -> None:
    """A rename cannot replace a directory that is not empty, so the old one steps aside first."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)
