"""A Hugging Face directory to a checkpoint that training reads as `model.path`, at any layout.

May import: config, models, weights, training.checkpoint_files, platform, conversion, types; no megatron-core.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_nsr.config import ParallelConfig
from megatron_nsr.conversion.parts import Part, make_folder
from megatron_nsr.models.hf_config import ModelShape, read_model_shape
from megatron_nsr.models.parallel import validate_layout
from megatron_nsr.platform.model_files import copy_tokenizer
from megatron_nsr.training.checkpoint_files import is_checkpoint, write_description
from megatron_nsr.types import UserError
from megatron_nsr.weights.checkpoint_pieces import CheckpointPart, part_bytes, part_pieces, plan_parts, stage_ranks
from megatron_nsr.weights.loading import check_hf_headers
from megatron_nsr.weights.safetensors_files import SafetensorsDirectory
from megatron_nsr.weights.safetensors_writing import DTYPES
from megatron_nsr.weights.torch_dist_files import StoredPiece, write_index, write_pieces


def import_hf(source: Path, target: Path, parallel: ParallelConfig) -> None:
    """Writes the checkpoint `target` of the weights in `source`, in the pieces that ranks of that layout load.

    Any other layout loads it as well. It holds weights only, in their own dtype. Memory: one parameter's shard. Raises UserError naming
    what is wrong with the input before anything is written, and OutputError.
    """
    if is_checkpoint(source):
        raise UserError(
            f"{source}: already a checkpoint, which training reads as it is, at any layout; `export` makes it a Hugging Face directory"
        )
    shape = read_model_shape(str(source))
    # Sequence parallelism, which a model with experts asks for, moves no weights.
    validate_layout(parallel.model_copy(update={"sequence": parallel.tensor > 1}), shape, stage_ranks(parallel) * parallel.pipeline)
    with SafetensorsDirectory(str(source)) as files:
        dtype = check_hf_headers(files, shape)
        request = {"import": str(source.resolve()), "files": _state_of(source, files), "layout": _layout(parallel)}
        element_size = DTYPES[dtype].itemsize
        parts = [
            Part(part.file, f"state/{part.file}", part_bytes(part, shape, parallel, element_size), _maker(part, shape, parallel, files))
            for part in plan_parts(shape, parallel)
        ]
        make_folder(target, request, parts, lambda content, stored: _finish(content, stored, source, request), title="import")


def _maker(part: CheckpointPart, shape: ModelShape, parallel: ParallelConfig, files: SafetensorsDirectory) -> Callable[[Path], Any]:
    def make(content: Path) -> list[dict[str, Any]]:
        (content / "state").mkdir(exist_ok=True)
        return [asdict(piece) for piece in write_pieces(content / "state" / part.file, part_pieces(part, shape, parallel, files))]

    return make


def _finish(content: Path, stored: list[list[dict[str, Any]]], source: Path, request: dict[str, Any]) -> None:
    write_index(content / "state", [StoredPiece.from_json(piece) for part in stored for piece in part])
    shutil.copyfile(source / "config.json", content / "config.json")
    copy_tokenizer(source, content)
    write_description(content, {"step": 0, "imported_from": request["import"], "layout": request["layout"]})


def _layout(parallel: ParallelConfig) -> dict[str, int]:
    return {name: getattr(parallel, name) for name in ("tensor", "pipeline", "virtual_pipeline", "expert")}


def _state_of(source: Path, files: SafetensorsDirectory) -> dict[str, list[int]]:
    """Size and time of change of every file that is read: other ones make another checkpoint."""
    stats = {name: (source / name).stat() for name in ("config.json", *files.file_names())}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
