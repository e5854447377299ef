"""Every configuration that we ship fits the hardware that it is written for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from examples.quickstart.prepare import MODEL
from megatron_nsr.config_files import load_config
from megatron_nsr.planning.command import show_plan
from megatron_nsr.planning.hardware import GIB
from megatron_nsr.planning.report import number

CONFIGS = Path(__file__).parents[3] / "configs"
INCLUDED = {"common.yaml", "model.yaml"}  # parts of the others
# (GPU, number of them) by folder or file under configs/, the longest match first.
HARDWARE = {"paper": ("h200", 8), "quickstart": ("cpu", 1), "reproduction": ("cpu", 1)}
HARDWARE |= {
    f"scale/{name}": ("h200", gpus)
    for name, gpus in {
        "qwen2.5_7b_1x8": 8,
        "qwen2.5_32b_4x8": 32,
        "qwen2.5_72b_8x8": 64,
        "qwen2.5_72b_128x8": 1024,
        "qwen3_30b_a3b_2x8": 16,
        "qwen3_235b_a22b_16x8": 128,
        "llama3.1_405b_64x8": 512,
    }.items()
}
RUNS = (path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml") if path.name not in INCLUDED)
FILES = sorted(path for path in RUNS if path.parts[0] != "clusters")  # those say where a job runs, not what

SCALE = [path for path in FILES if path.parts[0] == "scale"]
SCALING_PAGE = (CONFIGS.parent / "docs" / "scaling.md").read_text()
NOT_AS_PLANNED = {"qwen3_30b_a3b_2x8"}  # its layout is for a reason that the plan does not know


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


@pytest.mark.parametrize("file", SCALE, ids=str)
def test_the_page_and_the_layouts_of_many_nodes_are_as_planned(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu, gpus = hardware(file)
    show_plan(load_config(CONFIGS / file), gpus=gpus, gpu=gpu, as_json=True)
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    seconds = {name: phase["seconds"] for name, phase in plan["phases"].items()}
    times = (number(one) for one in (seconds["rollout"], seconds["update"], plan["step_seconds"]))
    row = f"| `{file.stem}` | {gpus:,} | {plan['memory']['peak'] / GIB:.1f} | {' | '.join(times)} |"
    assert row in SCALING_PAGE.splitlines()
    own = sum(seconds.values()) - seconds["rollout"]
    as_planned = own <= 1.05 * plan["suggestions"][0]["seconds_without_sampling"]
    assert as_planned != (file.stem in NOT_AS_PLANNED)
    assert not re.search(r"\d (s|GiB|%)( |$)", (CONFIGS / file).read_text(), re.MULTILINE)  # those stand on the page
