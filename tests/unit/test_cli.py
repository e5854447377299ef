"""How a command ends that cannot go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_nsr import cli
from megatron_nsr.types import NoVerdicts, RolloutsLost

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", [RolloutsLost, NoVerdicts])
def test_lost_servers_and_a_step_without_verdicts_are_one_line_and_a_failure(
    kind: type[RuntimeError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)

    def work() -> int:
        raise kind("rollout.servers[0]=http://a:1: gone; a checkpoint of step 3 is written, and the same command goes on")

    cli._exit(work)
    lines = capsys.readouterr().err.splitlines()
    assert ended == [1]
    assert lines == ["megatron-nsr: rollout.servers[0]=http://a:1: gone; a checkpoint of step 3 is written, and the same command goes on"]


def test_a_plan_whose_reader_has_left_ends_without_a_word() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "megatron_nsr", "plan", "configs/scale/qwen2.5_7b_1x8.yaml", "--gpus", "8", "--json"]
    with os.fdopen(write, "w") as nobody:
        done = subprocess.run(command, cwd=ROOT, stdout=nobody, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")
