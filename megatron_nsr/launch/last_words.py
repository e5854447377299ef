"""What the end of a failed job's log says, without what torchrun adds to it.

May import: the standard library.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

MESSAGE = "megatron-nsr: "  # what megatron_nsr.cli puts in front of one line about wrong input or lost servers
TRACEBACK = "Traceback (most recent call last):"
REPORT = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:"
SIGNAL = "Signal "  # as torchrun says: Signal 9 (SIGKILL) received by PID 7
OF_TORCHRUN = re.compile(r"[IWE]\d{4} \S+ +\d+ (torch/distributed/|\S*[/.]torch[/.]distributed[/.])")


def last_words(lines: Sequence[str]) -> list[str]:
    """The lines without torchrun's notes and traceback, and without its report of the ranks where a rank said itself what was wrong.

    A rank that was killed says nothing, and torchrun's report is all there is of it. Lines may have a rank in front, as SkyPilot's do.
    """
    report = next((index for index, line in enumerate(lines) if line.rstrip().endswith(REPORT)), None)
    before = list(lines if report is None else lines[: _start_of_traceback(lines, report)])
    said = [line for line in before if not OF_TORCHRUN.search(line)]
    ranks = [] if report is None else list(lines[report + 1 :])
    killed = any(SIGNAL in line for line in ranks)  # the others then say only that they lost a peer
    if any(MESSAGE in line or (line.endswith(TRACEBACK) and not killed) for line in said):
        return said
    return said + ranks


def _start_of_traceback(lines: Sequence[str], report: int) -> int:
    return next((index for index in range(report, -1, -1) if lines[index].endswith(TRACEBACK)), report)
