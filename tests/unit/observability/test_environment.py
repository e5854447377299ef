"""RUN/environment.json: what the numbers were made with."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_nsr.observability.environment import describe_checkout, describe_environment


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    done = subprocess.run(["git", "-C", str(directory), *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_versions_and_hardware_are_those_of_this_process() -> None:
    environment = describe_environment()
    assert environment["versions"]["python"] == platform.python_version()
    assert environment["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert environment["versions"]["megatron-core"] and environment["versions"]["math-verify"]
    assert environment["hardware"]["cores"] >= 1 and environment["hardware"]["memory_mib"] > 100
    assert len(environment["hardware"]["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert json.loads(json.dumps(environment)) == environment


def test_the_commit_of_the_checkout_and_whether_it_is_changed(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text("a = 1\n")
    git(tmp_path, "init", "-q")
    assert describe_checkout(source) is None  # not tracked: an installed copy inside somebody's checkout
    git(tmp_path, "add", "module.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    assert describe_checkout(source) == {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    source.write_text("a = 2\n")
    assert describe_checkout(source) == {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": True}


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_checkout(Path(__file__)) is None
