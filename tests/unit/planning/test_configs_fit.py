"""Every configuration that we ship fits the hardware that it is written for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.quickstart.prepare import MODEL
from megatron_nsr.config_files import load_config
from megatron_nsr.planning.command import show_plan

CONFIGS = Path(__file__).parents[3] / "configs"
INCLUDED = {"common.yaml", "model.yaml"}  # parts of the others
# (GPU, number of them) by folder or file under configs/, the longest match first.
HARDWARE = {"paper": ("h200", 8), "quickstart": ("cpu", 1), "reproduction": ("cpu", 1)}
FILES = sorted(path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml") if path.name not in INCLUDED)


def hardware(config: Path) -> tuple[str, int]:
    matches = [name for name in HARDWARE if str(config).startswith(name)]
    assert matches, f"configs/{config}: say in HARDWARE what it is meant for"
    return HARDWARE[max(matches, key=len)]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_config_fits_its_hardware(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu, gpus = hardware(file)
    overrides = []
    if gpu == "cpu":  # these models are made by the examples
        (tmp_path / "config.json").write_text(json.dumps(MODEL | {"vocab_size": 64}))
        overrides = [f"model.path={tmp_path}"]
    fits = show_plan(load_config(CONFIGS / file, overrides), gpus=gpus, gpu=gpu, as_json=True)
    plan = json.loads(capsys.readouterr().out)
    assert fits and plan["fits"], plan["verdict"]
    assert plan["verdict"].startswith("fits: ") and plan["memory"]["peak"] <= plan["memory"]["capacity"]
