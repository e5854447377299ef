"""Runs a test program's `main` on several ranks of this host: python -m tests.distributed.ranks NPROC MODULE [ARGUMENTS ...]

The module is imported once and the ranks are forked from it, because importing takes longer than most programs; torchrun is what the
integration tests start. The first rank that fails ends the others.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable

from megatron_nsr.platform.distributed import free_port


def main() -> None:
    nproc, program = int(sys.argv[1]), sys.argv[2]
    run: Callable[[], None] = importlib.import_module(program).main
    sys.argv = [program, *sys.argv[3:]]
    gc.freeze()  # programs collect garbage between cases; what is imported is none
    port = free_port()
    ranks = {fork(run, rank, nproc, port) for rank in range(nproc)}
    while ranks:
        pid, status = os.wait()
        ranks.discard(pid)
        if status:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            raise SystemExit(1)


def fork(run: Callable[[], None], rank: int, nproc: int, port: int) -> int:
    """The process number of the new rank."""
    if pid := os.fork():
        return pid
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc}
    os.environ |= {name: str(value) for name, value in {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items()}
    status = 1
    try:
        run()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
