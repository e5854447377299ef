"""One part in this process: `python -m tools.acceptance.part NAME FILE WORK [--dry]`; tools/gpu_acceptance.py starts it.

May import: the parts, each only when it runs: some need their environment set before anything of theirs is imported.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_nsr.observability.environment import describe_environment
from megatron_nsr.platform.quiet import ignore_library_warnings
from tools.acceptance.record import NotRun, Record

LIMIT_S = 480.0  # after which a part is killed
PLANNED_S = 450.0  # what it plans with itself
BUSY = 4  # times as long for a dry run: how busy the machine is must not decide it


@dataclass(frozen=True, slots=True)
class Part:
    """module: of tools.acceptance, with GOALS and run(record, work). dry_environment: what its dry run sets before it starts."""

    module: str
    title: str
    dry_environment: Mapping[str, str] = field(default_factory=dict)


PARTS = {
    "head": Part("head", "the fused head against float64, and its benchmark", {"TRITON_INTERPRET": "1"}),
    "policy": Part("policy", "a megatron-core policy beside Hugging Face's model"),
    "te": Part("te", "Transformer Engine's layers beside the cpu backend, and FP8 beside BF16"),
    "rollout": Part("rollout", "vLLM in the policy's process: pushes, generation, sleep, FP8 rollouts"),
    "job-1.5b": Part("job_large", "the main job colocated on one GPU, 1.5B shape"),
    "job-0.5b": Part("job_small", "the main job colocated on one GPU, 0.5B shape, 50 steps"),
    "vocabulary": Part("vocabulary", "the whole vocabulary with sequences of 4,096 tokens"),
    "tune": Part("tune", "which values of what can be set are fastest"),
}


def describe(name: str) -> dict[str, object]:
    """What stands in a result before its part has run: versions, date, device, commit."""
    found = describe_environment()
    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_mib": properties.total_memory >> 20,
            "cuda": torch.version.cuda,
        }
    return {"title": PARTS[name].title, **found, "device": gpu}


def run_part(name: str, file: Path, work: Path, *, dry: bool) -> bool:
    """Runs a part and writes its file; whether all that could run holds. Without CUDA there is only the dry run.

    work: shared by the parts; each has a folder of its own in it, made anew.
    """
    module = importlib.import_module(f"tools.acceptance.{PARTS[name].module}") if dry or torch.cuda.is_available() else None
    record = Record(file, name, describe(name), module.GOALS if module else {}, dry=dry, limit_s=PLANNED_S * (BUSY if dry else 1))
    own = work / name
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    try:
        if module is None:
            raise NotRun("torch sees no CUDA device; --dry exercises the program on a CPU")
        module.run(record, own)
    except NotRun as missing:
        record.not_run = str(missing)
    record.finish()
    return record.holds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=PARTS)
    parser.add_argument("file", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args()
    ignore_library_warnings()
    raise SystemExit(0 if run_part(arguments.name, arguments.file, arguments.work, dry=arguments.dry) else 1)


if __name__ == "__main__":
    main()
