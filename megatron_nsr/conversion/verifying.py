"""Compares a checkpoint with a Hugging Face directory, bit by bit. May import: conversion, models, weights, types; no megatron-core."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from megatron_nsr.conversion.exporting import open_checkpoint
from megatron_nsr.models.hf_config import ModelShape, read_model_shape
from megatron_nsr.types import UserError
from megatron_nsr.weights.checkpoint_pieces import read_entry
from megatron_nsr.weights.loading import check_hf_headers
from megatron_nsr.weights.mapping import whole_model_entries
from megatron_nsr.weights.safetensors_files import SafetensorsDirectory


def differences(checkpoint: Path, hf: Path) -> list[str]:
    """One line for each tensor that differs in its bytes or dtype, by its Hugging Face name. Memory: one parameter.

    Raises UserError where one of the two is broken, or their config.json describe different models.
    """
    reader, shape, _ = open_checkpoint(checkpoint)
    _same_shape(shape, read_model_shape(str(hf)), checkpoint, hf)
    found = []
    with SafetensorsDirectory(str(hf)) as files:
        check_hf_headers(files, shape)
        for layer, entry in track(list(whole_model_entries(shape)), "verify", console=Console(stderr=True)):
            for name, mine in zip(entry.hf, read_entry(reader, layer, entry, shape), strict=True):
                if (difference := _difference(mine, files[name])) is not None:
                    found.append(f"{name}: {difference}")
    return found


def _same_shape(mine: ModelShape, theirs: ModelShape, checkpoint: Path, hf: Path) -> None:
    for field in fields(ModelShape):
        a, b = getattr(mine, field.name), getattr(theirs, field.name)
        if a != b:
            raise UserError(f"config.json: {field.name} is {a} in {checkpoint} and {b} in {hf}; these are different models")


def _difference(mine: Tensor, theirs: Tensor) -> str | None:
    """What differs, in words; NaN equals itself, and -0 is not 0."""
    if mine.dtype != theirs.dtype:
        return f"{mine.dtype} in the checkpoint, {theirs.dtype} in the Hugging Face directory".replace("torch.", "")
    different = _bits(mine) != _bits(theirs)
    count = int(different.sum())
    if not count:
        return None
    distance = (mine.double() - theirs.double()).abs().max()
    return f"{count} of {mine.numel()} values differ, by at most {float(distance):.3g}"


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({4: torch.int32, 2: torch.int16}[tensor.element_size()])
