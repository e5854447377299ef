"""Keeps other libraries' start-up chatter off the terminal; `doctor` says what is missing. May import: the standard library."""

from __future__ import annotations

import logging
import os
import warnings


def ignore_library_warnings() -> None:
    """Hides warnings raised inside megatron-core, vLLM and torch; their errors and ours still show. Called before torch is imported."""
    # of torch's C++, which reads it at its import; on a CPU vLLM's start warns that memory is bound to a NUMA node (vLLM 0.32.0)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # vLLM logs it in every process on a machine without a GPU
    logging.getLogger("vllm.triton_utils.importing").addFilter(lambda record: "doesn't include CPU backend" not in record.getMessage())
    for package in ("megatron", "vllm", "torch"):
        warnings.filterwarnings("ignore", module=rf"{package}\.")
    # torch's reader of checkpoints raises it under our CPU patch's name (torch 2.13.0)
    warnings.filterwarnings("ignore", message="Please use DTensor", category=FutureWarning)
