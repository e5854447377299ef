"""`launch --dry-run` prints what would be submitted; each page of golden/ is what a user reads.

MEGATRON_NSR_WRITE_GOLDEN=1 writes them anew.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_nsr.config import Section
from megatron_nsr.launch.cluster import Cluster, RolloutServers, SkypilotSettings, SlurmSettings
from megatron_nsr.launch.command import launch

ROOT = Path(__file__).parents[3]
GOLDEN = Path(__file__).parent / "golden"
CONFIG = ROOT / "configs" / "quickstart.yaml"
CLUSTERS = ROOT / "configs" / "clusters"
CASES: dict[str, list[str]] = {
    "local": [],
    "docker": [],
    "slurm": [],
    "slurm_disaggregated": ["rollout.tensor_parallel=4"],
    "skypilot": [
        *("run.dir=/runs/nsr", "model.path=/models/base", "data.train=/data/train.jsonl"),
        "evaluation.benchmarks.puzzle=/data/test.jsonl",
    ],
}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A clean checkout of one commit as the working directory; returns the commit."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "reward.py").write_text("")
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path / "home"))
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, f"value-of-{name}")
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_reads_like_its_page_and_shows_no_secret(
    name: str, checkout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = launch(
        CONFIG,
        CASES[name],
        cluster_file=CLUSTERS / f"{name}.yaml",
        executor=None,
        dry_run=True,
        detach=False,
        follow=False,
        uncommitted=False,
    )
    shown = capsys.readouterr().out
    assert status == 0 and "value-of" not in shown
    for text, place in ((str(tmp_path), ""), (checkout, "COMMIT"), (sys.executable, "PYTHON")):
        shown = shown.replace(text, place)
    page = GOLDEN / f"{name}.txt"
    if os.environ.get("MEGATRON_NSR_WRITE_GOLDEN"):
        page.write_text(shown)
    assert shown == page.read_text()
    assert not (tmp_path / "home" / "megatron_nsr").exists() and not (tmp_path / "home" / "experiments").exists()


def test_the_manual_has_every_key() -> None:
    manual = (ROOT / "docs" / "launching.md").read_text()
    sections: dict[str, type[Section]] = {"rollout": RolloutServers, "slurm": SlurmSettings, "skypilot": SkypilotSettings}
    keys = [name for name in Cluster.model_fields if name not in sections]
    keys += [f"{section}.{name}" for section, schema in sections.items() for name in schema.model_fields]
    assert [key for key in keys if f"`{key}`" not in manual] == []
