"""A colocated training run on the task: its configuration, and the trainer's own parts built from it.

May import: everything.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import torch

from megatron_nsr.components import Components, Inputs, build_components, read_inputs
from megatron_nsr.config import Config
from megatron_nsr.config_files import parse_config
from tools.acceptance.task import prompt_tokens, response_tokens, write_problems

PROBLEMS = 512
MORE_TOKENS = 16  # that a response may have beyond a right one
SAMPLED_EVERY_S = 0.05


@dataclass(frozen=True, slots=True)
class RunSettings:
    """numbers: terms of a problem. gpu_memory_utilization: the engine's share on a GPU; kv_cache_mib: its cache on a CPU."""

    dtype: str
    numbers: int
    prompts: int
    samples: int
    tokens_per_micro_batch: int
    learning_rate: float
    sleep_level: int
    offload: str
    gpu_memory_utilization: float = 0.3
    kv_cache_mib: int | None = None


def run_config(model: Path, work: Path, settings: RunSettings, *, steps: int, **sections: Mapping[str, Any]) -> Config:
    """`reinforce` on the task, every sample of a step in one update; `sections` replace or add keys of each section."""
    data = write_problems(work / f"problems-{settings.numbers}.jsonl", numbers=settings.numbers, count=PROBLEMS, seed=7)
    values: dict[str, dict[str, Any]] = {
        "run": {"dir": str(work / "run"), "steps": steps, "seed": 1},
        "model": {"path": str(model), "dtype": settings.dtype},
        "data": {
            "train": str(data),
            "template": "plain",
            "max_prompt_tokens": prompt_tokens(settings.numbers),
            "prompts_per_step": settings.prompts,
        },
        "rollout": {
            "samples_per_prompt": settings.samples,
            "max_response_tokens": response_tokens(settings.numbers) + MORE_TOKENS,
            "max_num_seqs": settings.prompts * settings.samples,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "kv_cache_mib": settings.kv_cache_mib,
            "sleep_level": settings.sleep_level,
        },
        "objective": {"name": "reinforce", "mini_batch_prompts": settings.prompts, "aggregation": "token_mean"},
        "optimizer": {"learning_rate": settings.learning_rate},
        "training": {"tokens_per_micro_batch": settings.tokens_per_micro_batch, "offload": settings.offload},
        "logging": {"tensorboard": False, "sign_norms_every": 0, "samples_every": 0},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | dict(section)
    return parse_config(values)


@contextmanager
def built(config: Config) -> Iterator[tuple[Inputs, Components]]:
    """What `megatron-nsr train` builds: graders, policy, engine."""
    with ExitStack() as stack:
        inputs = read_inputs(config, training=True)
        yield inputs, build_components(config, inputs, stack)


class PeakMemory:
    """The most memory in use while it watches: of the whole device, whoever took it, or the process's own on a CPU."""

    def __init__(self) -> None:
        self.gib = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.gib = max(self.gib, used_gib())

    def _watch(self) -> None:
        while not self._done.wait(SAMPLED_EVERY_S):
            self.gib = max(self.gib, used_gib())


def used_gib() -> float:
    """Of the device at this moment, by what its driver says is free; on a CPU the process's largest so far."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**30
    return getrusage(RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def timed(call: Any) -> tuple[float, Any]:
    """Wall seconds of a call, with all that it left to the device, and what it returned."""
    _wait()
    start = time.perf_counter()
    result = call()
    _wait()
    return time.perf_counter() - start, result


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
