"""Runs a module's `find` on several ranks of this host: python -m tests.distributed.ranks NPROC MODULE RESULTS [PATH ...]

`find` gets the paths and returns what rank 0 writes to RESULTS as JSON. The module is imported once and the ranks are forked from it,
because importing takes longer than most cases; torchrun is what the integration tests start. The first rank that fails ends the others.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megatron_nsr.platform import distributed


def main() -> None:
    nproc, module, results, *paths = sys.argv[1:]
    find = partial(importlib.import_module(module).find, *map(Path, paths))
    gc.freeze()  # garbage is collected between cases; what is imported is none
    port = distributed.free_port()
    ranks = {fork(find, Path(results), rank, int(nproc), port) for rank in range(int(nproc))}
    while ranks:
        pid, status = os.wait()
        ranks.discard(pid)
        if status:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            raise SystemExit(1)


def fork(find: Callable[[], Any], results: Path, rank: int, nproc: int, port: int) -> int:
    """The process number of the new rank."""
    if pid := os.fork():
        return pid
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc}
    os.environ |= {name: str(value) for name, value in {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items()}
    status = 1
    try:
        run(find, results)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def run(find: Callable[[], Any], results: Path) -> None:
    distributed.init_process_group()
    found = find()
    if distributed.rank() == 0:
        results.write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy()


if __name__ == "__main__":
    main()
