"""Writes large buffers to files. May import: the standard library."""

from __future__ import annotations

from typing import Any, BinaryIO

SLICE = 256 << 10  # bytes


def write_sliced(file: BinaryIO, data: Any) -> int:
    """Writes all of a bytes-like object, in slices: one write of 64 MiB was measured to cost Linux several times the time of small ones.

    Returns the number of bytes.
    """
    view = memoryview(data).cast("B")
    for start in range(0, len(view), SLICE):
        file.write(view[start : start + SLICE])
    return len(view)
