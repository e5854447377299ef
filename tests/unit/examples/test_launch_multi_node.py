"""The multi-node example plans one job an objective."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from examples import launch_multi_node


def test_a_dry_run_shows_a_job_of_two_nodes_for_each_objective(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    for arguments in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("executor: slurm\ngpus_per_node: 8\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "argv", ["launch_multi_node.py", "--dry-run", "--cluster", str(cluster)])
    assert launch_multi_node.main() == 0
    shown = capsys.readouterr().out
    names = [line for line in shown.splitlines() if line.startswith("#SBATCH --job-name")]
    assert names == [f"#SBATCH --job-name=megatron_nsr.{name}" for name in ("psr", "nsr", "w-reinforce")]
    assert shown.count("#SBATCH --nodes=2\n") == shown.count("#SBATCH --ntasks-per-node=8\n") == 3


def test_wrong_input_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["launch_multi_node.py", "--dry-run", "--cluster", str(tmp_path / "none.yaml")])
    assert launch_multi_node.main() == 2
    assert capsys.readouterr().err.splitlines() == [f"launch_multi_node: config file {tmp_path}/none.yaml: no such file"]
