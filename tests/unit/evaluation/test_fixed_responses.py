"""A run's fixed responses: drawn or given once, kept, and the same ever after."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_nsr.data.prompts import PromptSet
from megatron_nsr.evaluation.fixed_responses import FixedResponses, fixed_responses
from megatron_nsr.rollout.engine import Sampling
from megatron_nsr.types import Prompt, Trajectory, UserError
from tests.plain_entropy import random_responses

STOP = 7
PLAIN = Sampling(temperature=1.0, max_tokens=4, stop_ids=(STOP,))


class Letters:
    """A tokenizer: one id a letter."""

    stop_ids = (STOP,)

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


@dataclass
class Engine:
    """Stands for the benchmarks and what they draw from; counts how often."""

    prompts: list[Prompt]
    draws: int = 0
    plain: Sampling = PLAIN

    @property
    def benchmarks(self) -> dict[str, PromptSet]:
        half = len(self.prompts) // 2
        return {"a": PromptSet(tuple(self.prompts[:half]), 0), "b": PromptSet(tuple(self.prompts[half:]), 0)}

    def draw_heldout(self) -> list[Trajectory]:
        self.draws += 1
        return random_responses(50, [(len(prompt.token_ids), 3) for prompt in self.prompts], seed=self.draws)


def problems(*responses: str | None) -> list[Prompt]:
    return [Prompt(f"p/{i}", "?", (1, 2, i), "2", response=response) for i, response in enumerate(responses)]


def made(path: Path, engine: Engine, *, draw: bool = True) -> FixedResponses:
    letters: Any = Letters()
    benchmarks: Any = engine
    return fixed_responses(path, benchmarks, letters, draw=draw)


def same(one: FixedResponses, other: FixedResponses) -> bool:
    def plain(found: FixedResponses) -> list[Any]:
        return [
            (t.prompt_ids, t.response_ids.tolist(), t.rollout_logprobs.tolist(), t.finish_reason, t.weight_version, t.text)
            for t in found.trajectories
        ]

    assert all(t.response_ids.dtype == np.int32 and t.rollout_logprobs.dtype == np.float32 for t in other.trajectories)
    return plain(one) == plain(other)


def test_they_are_drawn_once_and_outlive_a_change_of_benchmarks(tmp_path: Path) -> None:
    path, engine = tmp_path / "run" / "fixed.parquet", Engine(problems(None, "x", None))
    first = made(path, engine)
    assert len(first.trajectories) == 3 and same(first, made(path, engine)) and engine.draws == 1
    assert same(first, made(path, Engine(problems("a", "b")))) and [file.name for file in path.parent.iterdir()] == ["fixed.parquet"]


def test_a_file_s_responses_are_used_where_every_problem_has_one(tmp_path: Path) -> None:
    engine = Engine(problems("ab", "abcdefg"))
    found = made(tmp_path / "fixed.parquet", engine)
    assert [t.response_ids.tolist() for t in found.trajectories] == [[97, 98, STOP], [97, 98, 99, 100]]  # cut at the budget of 4
    assert [t.prompt_ids for t in found.trajectories] == [(1, 2, 0), (1, 2, 1)] and engine.draws == 0
    assert same(found, made(tmp_path / "fixed.parquet", engine))


def test_without_weights_worth_drawing_from_there_are_none(tmp_path: Path) -> None:
    assert made(tmp_path / "fixed.parquet", Engine(problems(None)), draw=False) == FixedResponses()
    assert made(tmp_path / "fixed.parquet", Engine([])) == FixedResponses() and not list(tmp_path.iterdir())


def test_a_file_that_is_none_of_ours_is_named(tmp_path: Path) -> None:
    path = tmp_path / "fixed.parquet"
    path.write_text("something else")
    with pytest.raises(UserError, match=r"fixed\.parquet: not a file of fixed responses \(.*\); restore it, or remove it"):
        made(path, Engine(problems(None)))
