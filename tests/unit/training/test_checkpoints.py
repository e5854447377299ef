"""Which checkpoints stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_nsr.training.checkpoints import Checkpoints


@pytest.mark.parametrize(
    ("keep", "written", "left"),
    [
        (1, 30, [30]),  # 50 is of a future that was given up when `latest` was pointed back
        (2, 30, [25, 30]),
        (3, 50, [25, 30, 50]),
    ],
)
def test_the_newest_up_to_the_one_just_written_stay(tmp_path: Path, keep: int, written: int, left: list[int]) -> None:
    for step in (5, 25, 30, 50):
        (tmp_path / f"step_{step}").mkdir()
    (tmp_path / "step_50.copy").mkdir()  # a user's own
    Checkpoints(tmp_path, keep=keep)._prune(written)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*(f"step_{step}" for step in left), "step_50.copy"])
