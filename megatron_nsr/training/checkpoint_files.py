"""What a checkpoint's folder consists of, and whether it is complete. May import: types; no megatron-core, so that tools start fast."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_nsr.types import UserError

RUN_FILE = "run.json"
RESUME_REMEDY = "restore it from a copy, point `latest` at an older step, or choose another run.dir"
REMEDY = "restore it from a copy, or give another checkpoint"
FORMAT = 2  # of everything in a step_N; 1 had the optimizer's state in megatron-core's own forms


def newest_checkpoint(directory: Path) -> Path | None:
    """What RUN/checkpoints/latest names, None before the first checkpoint. Raises UserError where it is not complete."""
    link = directory / "latest"
    if not link.is_symlink():
        return None
    found = link.resolve()
    read_description(found, RESUME_REMEDY)
    return found


def read_description(path: Path, remedy: str = REMEDY) -> dict[str, Any]:
    """A checkpoint's run.json. Raises UserError where it is of another format, or a file is missing or has another size than it had.

    remedy: what may be done about it.
    """
    try:
        description: dict[str, Any] = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))
        expected = description["files"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"checkpoint {path}: {RUN_FILE} cannot be read ({type(error).__name__}); {remedy}") from None
    if (written := description.get("format", 1)) != FORMAT:
        raise UserError(
            f"checkpoint {path}: its format is {written}, and this version of megatron_nsr reads {FORMAT}; "
            "go on with the version that wrote it, or start a new run.dir from weights in Hugging Face format"
        )
    found = _sizes(path)
    for name, size in expected.items():
        if name not in found:
            raise UserError(f"checkpoint {path}: the file {name} is missing; {remedy}")
        if found[name] != size:
            raise UserError(f"checkpoint {path}: the file {name} has {found[name]} bytes, not {size}; {remedy}")
    return description


def is_checkpoint(path: str | Path) -> bool:
    """Whether a `model.path` is a checkpoint of ours rather than a Hugging Face directory."""
    return (Path(path) / RUN_FILE).is_file()


def write_description(path: Path, values: Mapping[str, Any]) -> None:
    """Writes run.json with the format and the sizes of all other files, which must be complete."""
    (path / RUN_FILE).write_text(json.dumps({"format": FORMAT, **values, "files": _sizes(path)}, indent=1))


def _sizes(checkpoint: Path) -> dict[str, int]:
    """Bytes of every file but run.json, by its path inside the checkpoint."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != RUN_FILE)
    return {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
