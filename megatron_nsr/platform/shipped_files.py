"""The configs, examples, lock files and tools that come with an installed package, copied to where a user wants to change them.

May import: types.
"""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path, PurePosixPath

from megatron_nsr.types import UserError

PROJECT = "megatron_nsr"
SHARE = PurePosixPath("share") / PROJECT  # pyproject.toml's [tool.setuptools.data-files]
FOLDERS = ("configs", "examples", "requirements", "tools")


def copy_shipped_files(out: Path) -> list[Path]:
    """Writes OUT/{configs,examples,requirements,tools} and returns these folders.

    Raises UserError where one of them is there already, and where the package was installed from a checkout, which has them itself.
    """
    folders = [out / name for name in FOLDERS]
    files = shipped_files()
    if not files:
        raise UserError("examples: this installation brought none; it is a checkout's, and configs/ and examples/ are there")
    there = [folder for folder in folders if folder.exists()]
    if there:
        raise UserError(f"--out={out}: {there[0]} is there already; name another folder")
    for relative, source in files.items():
        target = out / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return folders


def shipped_files() -> dict[PurePosixPath, Path]:
    """Where each lies, by its path relative to the folder that they were packed from; empty for an editable installation."""
    try:
        recorded = metadata.files(PROJECT) or []
    except metadata.PackageNotFoundError:
        return {}
    found = {}
    for file in recorded:
        _, share, relative = str(file).partition(f"{SHARE}/")
        if share and not relative.endswith(".pyc"):  # pip compiles what it installs
            found[PurePosixPath(relative)] = Path(str(file.locate()))
    return found
