"""Fills a model's parameters from Hugging Face tensors, read from files or drawn at random.

May import: models, types. Runs on every rank, without communication.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_nsr.models.hf_config import ModelShape
from megatron_nsr.types import UserError
from megatron_nsr.weights.mapping import chunk_entries, hf_names, hf_tensor_shape
from megatron_nsr.weights.safetensors_files import SafetensorsDirectory
from megatron_nsr.weights.safetensors_writing import DTYPES

if TYPE_CHECKING:
    from megatron_nsr.models.policy import PolicyModel

# Buffers that old exports carry and nobody reads.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@torch.no_grad()
def load_hf_weights(chunks: Sequence[PolicyModel], shape: ModelShape, tensors: Mapping[str, Tensor]) -> None:
    """Fills every parameter of this rank's chunks from HF-named tensors, which keep their values in the parameter's dtype.

    Raises UserError naming a tensor that is missing, of a wrong shape, or not part of the model, or a tied head that is not the
    embedding, and RuntimeError naming a parameter that the mapping does not fill.
    """
    _refuse_unknown(shape, tensors)
    _refuse_another_head(shape, tensors)
    unfilled = {(i, name) for i, chunk in enumerate(chunks) for name, _ in chunk.named_parameters()}
    tp = chunks[0].pg_collection.tp
    for chunk, entry, name, parameter in chunk_entries(chunks, shape):
        shard = entry.layout.split([_read(tensors, hf, shape) for hf in entry.hf], tp.rank(), tp.size(), shape)
        if shard.shape != parameter.shape:
            raise RuntimeError(f"{name} has shape {tuple(parameter.shape)}, its weights {tuple(shard.shape)}")
        parameter.copy_(shard)
        unfilled.discard((chunk, name))
    if unfilled:
        raise RuntimeError(f"no Hugging Face tensor fills {', '.join(name for _, name in sorted(unfilled))}")


def check_hf_headers(files: SafetensorsDirectory, shape: ModelShape) -> str:
    """The dtype that all tensors of a directory have, by safetensors' name; reads their headers, and a tied model's head if it has one.

    Raises UserError naming a tensor that is missing, of a wrong shape or dtype, or not part of the model, or a tied head that is not
    the embedding.
    """
    _refuse_unknown(shape, files)
    first, *_ = names = hf_names(shape)
    for name in names:
        if name not in files:
            raise _missing(name, shape, files)
        header, wanted = files.header(name), files.header(first).dtype
        _require_shape(name, header.shape, shape, files)
        if header.dtype not in DTYPES:
            raise UserError(f"{_place(files)}: tensor {name} has dtype {header.dtype}; supported are {', '.join(DTYPES)}")
        if header.dtype != wanted:
            raise UserError(f"{_place(files)}: tensor {name} has dtype {header.dtype}, but {first} has {wanted}; all must have one")
    _refuse_another_head(shape, files)
    return files.header(first).dtype


def random_hf_tensors(shape: ModelShape, seed: int) -> Mapping[str, Tensor]:
    """Float32 initial weights under HF names: normal with the config's initializer_range, norms one, biases zero.

    Each tensor depends on (seed, name) alone, so that the model is the same on every layout.
    """
    return _RandomTensors(shape, seed)


class _RandomTensors(Mapping[str, Tensor]):
    def __init__(self, shape: ModelShape, seed: int) -> None:
        self.shape, self.seed = shape, seed
        self._names = dict.fromkeys(hf_names(shape))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        size = hf_tensor_shape(name, self.shape)
        if name.endswith(".bias"):
            return torch.zeros(size)
        if name.endswith("norm.weight"):
            return torch.ones(size)
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        return torch.randn(size, generator=generator) * self.shape.initializer_range

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _place(tensors: Mapping[str, Tensor]) -> str:
    """What messages call the model: the field, with its value where the tensors come from a directory."""
    return f"model.path={tensors.path}" if isinstance(tensors, SafetensorsDirectory) else "model.path"


def _read(tensors: Mapping[str, Tensor], name: str, shape: ModelShape) -> Tensor:
    if name not in tensors:
        raise _missing(name, shape, tensors)
    tensor = tensors[name]
    _require_shape(name, tuple(tensor.shape), shape, tensors)
    return tensor


def _missing(name: str, shape: ModelShape, tensors: Mapping[str, Tensor]) -> UserError:
    return UserError(f"{_place(tensors)}: no tensor {name}, which this {shape.family} model needs")


def _require_shape(name: str, found: tuple[int, ...], shape: ModelShape, tensors: Mapping[str, Tensor]) -> None:
    if found != (expected := hf_tensor_shape(name, shape)):
        raise UserError(f"{_place(tensors)}: tensor {name} has shape {found}, config.json asks for {expected}")


def _refuse_unknown(shape: ModelShape, tensors: Mapping[str, Tensor]) -> None:
    known = set(hf_names(shape)) | ({HEAD} if shape.tie_embeddings else set())
    unknown = [name for name in tensors if name not in known and not name.endswith(IGNORED_SUFFIXES)]
    if unknown:
        which = f"tensor {unknown[0]} is" if len(unknown) == 1 else f"tensors {unknown[0]} and {len(unknown) - 1} more are"
        raise UserError(f"{_place(tensors)}: {which} no part of a {shape.family} model of {shape.num_layers} layers")


def _refuse_another_head(shape: ModelShape, tensors: Mapping[str, Tensor]) -> None:
    """A tied model's own head would be dropped; that changes nothing only where it is the embedding, bit for bit."""
    if not shape.tie_embeddings or HEAD not in tensors or EMBEDDING not in tensors:
        return
    head, embedding = tensors[HEAD], tensors[EMBEDDING]
    same_kind = head.dtype == embedding.dtype and head.shape == embedding.shape
    if not same_kind or not torch.equal(head.contiguous().view(torch.uint8), embedding.contiguous().view(torch.uint8)):
        raise UserError(
            f"{_place(tensors)}: config.json says tie_word_embeddings=true, but tensor {HEAD} is not {EMBEDDING}: "
            "set tie_word_embeddings=false in config.json to keep it, or take it out"
        )
