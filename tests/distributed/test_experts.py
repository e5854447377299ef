"""A mixture of experts trains at every layout as on one rank, and its experts are found and gathered wherever they live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checksums import whole_checksum
from tests.distributed.expert_cases import LAYOUTS
from tests.distributed.launcher import run_cases
from tests.distributed.test_training import close, same
from tests.tiny_models import write_tiny_model

SAME_LOSS = [layout for world in LAYOUTS for layout in LAYOUTS[world] if layout not in ("one", "one_without_aux_loss")]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts")


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, Any]:
    write_tiny_model(out / "model", "qwen3_moe", tied=False)
    found: dict[str, Any] = {}
    for world in LAYOUTS:
        found |= run_cases("tests.distributed.expert_cases", world, ["--model", str(out / "model"), "--out", str(out)])
    return found
