"""A folder that appears under its name only when it is complete, and whose making survives a kill.

May import: types. While TARGET is made there is TARGET.partial:

    request.json     what is being made of what; another request starts afresh
    parts/NAME.json  written when part NAME is on the disk, with what its maker wants to know of it later
    content/         becomes TARGET
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_nsr.types import UserError


class PartialFolder:
    """TARGET.partial. One process opens it (a context manager, which locks it) and publishes; any number of them keep parts."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(target.name + ".partial")
        self.content, self._parts, self._request = self.path / "content", self.path / "parts", self.path / "request.json"
        self._lock: int | None = None

    def open(self, request: Mapping[str, Any]) -> None:
        """Makes the folder, or goes on with one of the same request. request: whatever decides the content; a JSON object.

        Raises UserError where the target is there already, cannot be made, or is being made by another process.
        """
        if self.target.exists() and not (self.target.is_dir() and not any(self.target.iterdir())):
            raise UserError(f"{self.target}: already there; give another name, or remove it first")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path}: another process is writing it") from None
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise UserError(f"{self.target}: cannot be made: {error.strerror} ({error.filename})") from None
        if self._read(self._request) != dict(request) or not self.content.is_dir():  # without content: killed while it published
            self._start_afresh(request)

    def _start_afresh(self, request: Mapping[str, Any]) -> None:
        found = {path.name for path in self.path.iterdir()}
        if found - {"request.json", "request.json.new", "parts", "content"}:
            raise UserError(f"{self.path}: has files in it that no conversion wrote; move it away")
        for name in found:  # request.json goes first: what it stood for is no longer complete
            self._request.unlink(missing_ok=True)
            path = self.path / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self.content.mkdir()
        self._parts.mkdir()
        self._write(self._request, dict(request))

    def kept(self, part: str) -> Any | None:
        """What `keep` was given for a part that is complete; None for any other."""
        return self._read(self._parts / f"{part}.json")

    def keep(self, part: str, file: str, result: Any) -> None:
        """Brings the part's file in `content` to the disk, then notes that it is there. result: anything JSON can hold but null."""
        _sync(self.content / file)
        self._write(self._parts / f"{part}.json", result)

    def publish(self) -> None:
        """The content becomes the target."""
        for path in (*self.content.rglob("*"), self.content):
            _sync(path)
        os.replace(self.content, self.target)
        _sync(self.target.parent)
        shutil.rmtree(self.path)

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> PartialFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @staticmethod
    def _read(path: Path) -> Any | None:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None

    @staticmethod
    def _write(path: Path, value: Any) -> None:
        """Whole or not at all, also for a reader after a crash."""
        new = path.with_name(path.name + ".new")
        with new.open("w", encoding="utf-8") as file:
            json.dump(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)


def _sync(path: Path) -> None:
    """Brings a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
