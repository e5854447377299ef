"""Shell completion in a real bash: what it offers, and what `--install-completion` leaves in a home directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home directory whose bin holds the command."""
    command = tmp_path / "bin" / "megatron-nsr"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m megatron_nsr "$@"\n')
    command.chmod(0o755)
    return tmp_path


def bash(home: Path, script: str) -> list[str]:
    """Lines that an interactive bash of that home prints. The command must find bash above it to know which shell asks."""
    environment = os.environ | {"HOME": str(home), "PATH": f"{home / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "--norc", "-c", f"{script}\ntrue"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.splitlines()


def offered(*words: str) -> str:
    """Bash that prints what the completion function offers for the last word."""
    quoted = " ".join(f"'{word}'" for word in words)
    return (
        f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _megatron_nsr_completion megatron-nsr; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("megatron-nsr", "eva"), ["evaluate"]),
        (("megatron-nsr", "score", "--allow"), ["--allow-uneven"]),
        (("megatron-nsr", "launch", "--executor", "s"), ["slurm", "skypilot"]),
        (("megatron-nsr", "plan", "--gpu", "h"), ["h200", "h100"]),
        (("megatron-nsr", "nothing"), [""]),
    ],
)
def test_commands_and_options_are_completed(home: Path, words: tuple[str, ...], expected: list[str]) -> None:
    assert bash(home, f'eval "$(megatron-nsr --show-completion)"\n{offered(*words)}') == expected


def test_what_is_installed_completes_in_the_next_shell(home: Path) -> None:
    bash(home, "megatron-nsr --install-completion")
    assert bash(home, f". ~/.bashrc\n{offered('megatron-nsr', 'doc')}") == ["doctor"]
