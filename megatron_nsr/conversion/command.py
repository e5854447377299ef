"""How the conversion tools end. May import: conversion.parts, platform, types."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable

from megatron_nsr.conversion.parts import OutputError
from megatron_nsr.platform import distributed
from megatron_nsr.types import UserError

OPTIONS = {"virtual_pipeline": "virtual"}  # where an option has another name than the config key
RANK_0_SPEAKS_FIRST_S = 1.0  # torchrun ends the others once rank 0 has left, before they repeat it


def exit_with(work: Callable[[], int]) -> None:
    """Ends the process with what `work` returns; 2 for wrong input and 1 for an output that cannot be written, with one line on stderr."""
    try:
        status = work()
    except UserError as error:
        status = _say(_in_the_tools_words(str(error)), 2)
    except OutputError as error:
        status = _say(str(error), 1)
    sys.stdout.flush()
    sys.stderr.flush()
    if distributed.world_size() > 1 and status:
        os._exit(status)  # must not wait for the others in a teardown
    distributed.destroy()
    raise SystemExit(status)


def _in_the_tools_words(problem: str) -> str:
    """Names what stands on the command line instead of a config's keys."""
    options = re.sub(r"\bparallel\.(\w+)", lambda key: f"--{OPTIONS.get(key[1], key[1])}", problem)
    return options.removeprefix("model.path=")


def _say(problem: str, status: int) -> int:
    if distributed.launched_rank():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(RANK_0_SPEAKS_FIRST_S)
    print(problem, file=sys.stderr)
    return status
