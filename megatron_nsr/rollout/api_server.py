"""The process that `megatron-nsr serve` becomes: vLLM's API server, which says when it listens and whose processes die with it.

May import: models, types, this package and the standard library; in functions only, as every process that vLLM spawns runs this module
before its own work.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import runpy
import signal
import sys
import threading
import time
import urllib.request

from megatron_nsr.platform.quiet import ignore_library_warnings

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PAUSE_S, ANSWER_S = 0.5, 5.0
ANY_ADDRESS = ("0.0.0.0", "::")


def die_with_parent() -> None:
    """Has the system kill this process when the one that started it ends, however that ends: `kill -9` leaves nothing behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def tell_when_ready(host: str, port: int, model: str) -> None:
    """Prints a line once the server on that port answers."""
    inside = "127.0.0.1" if host in ANY_ADDRESS else host
    while not _answers(f"http://{inside}:{port}/health"):
        time.sleep(PAUSE_S)
    print(f"http://{host}:{port}: ready, {model}; its weights come from a trainer (rollout.mode=server)", flush=True)


def _answers(url: str) -> bool:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=ANSWER_S) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def main() -> None:
    """Runs vLLM's API server with this process's arguments; exit status 2 and one line for a model that it cannot sample from."""
    import torch

    from megatron_nsr.models.hf_config import read_model_shape
    from megatron_nsr.rollout.vllm_api import API_SERVER
    from megatron_nsr.rollout.vllm_options import check_head_size
    from megatron_nsr.types import UserError

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--model")
    given = parser.parse_known_args()[0]
    if not torch.cuda.is_available():
        try:
            check_head_size(read_model_shape(given.model).head_dim)
        except UserError as error:
            print(f"megatron-nsr: {error}", file=sys.stderr)
            raise SystemExit(2) from None
    threading.Thread(target=tell_when_ready, args=(given.host, given.port, given.model), daemon=True).start()
    runpy.run_module(API_SERVER, run_name="__main__")  # __main__ stays this module, which what vLLM spawns starts with


if __name__ in ("__main__", "__mp_main__"):
    ignore_library_warnings()
    os.register_at_fork(after_in_child=die_with_parent)
    if __name__ == "__mp_main__":
        die_with_parent()
    else:
        main()
