"""Fills a model's parameters from Hugging Face tensors, read from files or drawn at random.

May import: models, types. Runs on every rank, without communication.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from megatron_nsr.models.hf_config import ModelShape
from megatron_nsr.models.policy import PolicyModel
from megatron_nsr.types import UserError
from megatron_nsr.weights.mapping import chunk_entries, hf_names, hf_tensor_shape

# Buffers that old exports carry and nobody reads.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)


@torch.no_grad()
def load_hf_weights(chunks: Sequence[PolicyModel], shape: ModelShape, tensors: Mapping[str, Tensor]) -> None:
    """Fills every parameter of this rank's chunks from HF-named tensors, which keep their values in the parameter's dtype.

    Raises UserError naming a tensor that is missing, of a wrong shape, or not part of the model, and RuntimeError naming a
    parameter that the mapping does not fill.
    """
    _refuse_unknown(shape, tensors)
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


def _read(tensors: Mapping[str, Tensor], name: str, shape: ModelShape) -> Tensor:
    if name not in tensors:
        raise UserError(f"model.path: no tensor {name}, which this {shape.family} model needs")
    tensor, expected = tensors[name], hf_tensor_shape(name, shape)
    if tuple(tensor.shape) != expected:
        raise UserError(f"model.path: tensor {name} has shape {tuple(tensor.shape)}, config.json asks for {expected}")
    return tensor


def _refuse_unknown(shape: ModelShape, tensors: Mapping[str, Tensor]) -> None:
    known = set(hf_names(shape)) | ({"lm_head.weight"} if shape.tie_embeddings else set())
    unknown = [name for name in tensors if name not in known and not name.endswith(IGNORED_SUFFIXES)]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(f"model.path: tensor {unknown[0]}{more} is no part of a {shape.family} model of {shape.num_layers} layers")
