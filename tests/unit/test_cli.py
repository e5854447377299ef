"""How a command ends that cannot go on."""

from __future__ import annotations

import os

import pytest

from megatron_nsr import cli
from megatron_nsr.types import RolloutsLost


def test_lost_servers_are_one_line_and_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)

    def work() -> int:
        raise RolloutsLost("rollout.servers[0]=http://a:1: gone; a checkpoint of step 3 is written, and the same command goes on")

    cli._exit(work)
    lines = capsys.readouterr().err.splitlines()
    assert ended == [1]
    assert lines == ["megatron-nsr: rollout.servers[0]=http://a:1: gone; a checkpoint of step 3 is written, and the same command goes on"]
