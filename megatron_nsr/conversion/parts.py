"""Makes a folder of parts that do not depend on each other, over the ranks of torchrun or in one process, and resumes.

May import: conversion.partial, platform, types.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_nsr.conversion.partial import PartialFolder
from megatron_nsr.platform import distributed
from megatron_nsr.types import UserError


class OutputError(Exception):
    """The output could not be written, for want of space as a rule; the input is not to blame. Exit status 1."""


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of work that leaves one file behind. make: gets the content folder, returns what `finish` needs of it (JSON)."""

    name: str
    file: str  # in the content folder
    bytes: int
    make: Callable[[Path], Any]


def make_folder(
    target: Path, request: Mapping[str, Any], parts: Sequence[Part], finish: Callable[[Path, list[Any]], None], *, title: str
) -> None:
    """Makes `target` of `parts`, which the ranks share; rank 0 then calls `finish` with the content folder and all results, in order.

    Every rank calls this. Raises UserError or OutputError, the same on every rank; the target is then as it was, and complete parts stay
    for the next call with the same request.
    """
    if distributed.launched_world_size() > 1:
        distributed.init_process_group()
    with PartialFolder(target) as folder:
        _together(folder, lambda: folder.open(request) if distributed.rank() == 0 else None)
        mine = parts[distributed.rank() :: distributed.world_size()]
        _together(folder, lambda: _make(folder, mine, title))
        _together(folder, lambda: _finish(folder, parts, finish) if distributed.rank() == 0 else None)


def _make(folder: PartialFolder, parts: Sequence[Part], title: str) -> None:
    left = [part for part in parts if folder.kept(part.name) is None]
    ranks = f", rank 0 of {distributed.world_size()}" if distributed.world_size() > 1 else ""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=distributed.rank() != 0) as progress:
        total = sum(part.bytes for part in parts)
        task = progress.add_task(title + ranks, total=total, completed=total - sum(part.bytes for part in left))
        # One part is brought to the disk while the next is made.
        keeping: Future[None] | None = None
        with ThreadPoolExecutor(1) as thread:
            for part in left:
                result = part.make(folder.content)
                if keeping is not None:
                    keeping.result()
                keeping = thread.submit(folder.keep, part.name, part.file, result)
                progress.advance(task, part.bytes)
        if keeping is not None:
            keeping.result()


def _finish(folder: PartialFolder, parts: Sequence[Part], finish: Callable[[Path, list[Any]], None]) -> None:
    finish(folder.content, [folder.kept(part.name) for part in parts])
    folder.publish()


def _together(folder: PartialFolder, work: Callable[[], None]) -> None:
    """Does this rank's share, then raises on every rank what the first of them met."""
    problem: Exception | None = None
    try:
        work()
    except UserError as error:
        problem = error
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        problem = OutputError(
            f"{folder.target}: not written: {reason} ({error.filename or folder.path}); what is complete stays in {folder.path}: "
            "make room and give the same command again, or remove it"
        )
    for found in distributed.all_gather_object(problem):
        if found is not None:
            raise found
