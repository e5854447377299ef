"""Kept generations: an interrupted evaluation goes on where it stopped, and one of other settings is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet

from megatron_nsr.config import Config
from megatron_nsr.config_files import parse_config
from megatron_nsr.data.prompts import PromptSet
from megatron_nsr.evaluation.benchmarks import Benchmarks
from megatron_nsr.evaluation.generations import SCHEMA, Generations, check_settings, generation_settings, weights_digest
from megatron_nsr.phases import Phases
from megatron_nsr.rollout.engine import Completion, SampleRequest, Sampling
from megatron_nsr.rollout.rollouts import Rollouts
from megatron_nsr.training.offload import Offload
from megatron_nsr.types import Outcome, Prompt, Reason, Trajectory, UserError, Verdict

STOP = 9
PROBLEMS = PromptSet(tuple(Prompt(f"p{i}", "", (i + 1,), str(i), extra={"level": i % 2}) for i in range(5)), too_long=0)


class SeedEngine:
    """Answers a number that depends on the seed alone. fails_at: the call that the process does not survive."""

    dtype = torch.float32
    version = 0

    def __init__(self, fails_at: int | None = None) -> None:
        self.asked: list[list[SampleRequest]] = []
        self.fails_at = fails_at

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[Completion]:
        if len(self.asked) == self.fails_at:
            raise KeyboardInterrupt
        self.asked.append(list(requests))
        ids = [np.array([(request.seed + i) % 5, STOP], np.int32) for request in requests for i in range(request.n)]
        return [Completion(sequence, np.zeros(2, np.float32), "stop") for sequence in ids]

    def close(self) -> None: ...


class Graders:
    def grade(self, items: Sequence[tuple[str, Prompt]]) -> list[Verdict]:
        def verdict(response: str, prompt: Prompt) -> Verdict:
            right = response == prompt.answer
            return Verdict(Outcome.CORRECT if right else Outcome.WRONG, Reason.MATCH if right else Reason.MISMATCH, response)

        return [verdict(*item) for item in items]


class Actor:
    def measure_samples(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        return {"policy/entropy": 1.0, "rollout/logprob_gap_mean": 0.0, "rollout/logprob_gap_max": 0.0}


def config(**evaluation: Any) -> Config:
    return parse_config(
        {
            "run": {"dir": "run", "steps": 1},
            "model": {"path": "model"},
            "data": {"template": "plain"},
            "objective": {"name": "nsr"},
            "reward": {"grader": "own:Grader"},
            "evaluation": {"samples": 4, "part_samples": 8, "greedy": False, **evaluation},
        }
    )


def evaluate(directory: Path | None, engine: SeedEngine, **evaluation: Any) -> dict[str, Any]:
    settings = config(**evaluation)
    sampler: Any = engine
    parts: Any = (Graders(), Actor())
    benchmarks = Benchmarks(
        {"toy": PROBLEMS},
        Rollouts(sampler, lambda ids: str(ids[0]), run_seed=0),
        parts[0],
        Phases(Offload([], "none"), 0),
        settings.evaluation,
        settings.reward,
        training_temperature=1.0,
        max_response_tokens=4,
        stop_ids=(STOP,),
    )
    values = generation_settings(settings, "toy", PROBLEMS, (STOP,))
    keep = {"toy": Generations(directory, {**values, "model.path": "weights a"})} if directory else None
    return benchmarks.run(0, parts[1], keep).result


def sampled(engine: SeedEngine) -> list[list[int]]:
    """The prompts of each call for Pass@k, which alone asks for several responses."""
    return [[request.prompt_ids[0] for request in call] for call in engine.asked if call[0].n > 1]


def rows(directory: Path) -> list[dict[str, Any]]:
    return [row for part in sorted(directory.glob("*.parquet")) for row in parquet.read_table(part).to_pylist()]


@pytest.fixture
def undisturbed(tmp_path: Path) -> Iterator[tuple[dict[str, Any], Path]]:
    directory = tmp_path / "undisturbed"
    yield evaluate(directory, SeedEngine()), directory


def test_generations_are_kept_in_parts(undisturbed: tuple[dict[str, Any], Path]) -> None:
    result, directory = undisturbed
    assert [path.name for path in sorted(directory.iterdir())] == [
        "_settings.json",
        "part_00000.parquet",
        "part_00001.parquet",
        "part_00002.parquet",
    ]
    kept = rows(directory)
    assert list(kept[0]) == SCHEMA.names
    assert [(row["problem"], row["problem_id"], row["sample"]) for row in kept] == [(i, f"p{i}", j) for i in range(5) for j in range(4)]
    assert all(row["tokens"] == [int(row["response"]), STOP] and row["finish_reason"] == "stop" for row in kept)
    for problem in result["benchmarks"]["toy"]["problems"]:
        assert problem["correct"] == sum(row["outcome"] == "correct" for row in kept if row["problem_id"] == problem["id"])


def test_keeping_changes_no_result(undisturbed: tuple[dict[str, Any], Path]) -> None:
    engine = SeedEngine()
    assert evaluate(None, engine) == undisturbed[0]
    assert sampled(engine) == [[1, 2, 3, 4, 5]]


@pytest.mark.parametrize(("fails_at", "left"), [(0, [[1, 2], [3, 4], [5]]), (1, [[3, 4], [5]]), (2, [[5]]), (3, [])])
def test_an_interrupted_evaluation_goes_on_with_the_same_result(
    undisturbed: tuple[dict[str, Any], Path], tmp_path: Path, fails_at: int, left: list[list[int]]
) -> None:
    directory = tmp_path / "interrupted"
    with pytest.raises(KeyboardInterrupt):
        evaluate(directory, SeedEngine(fails_at))
    if fails_at:
        (directory / ".part_00009.parquet.ab.tmp").write_bytes(b"torn")  # what a kill leaves while a part is written
    engine = SeedEngine()
    assert evaluate(directory, engine) == undisturbed[0]
    assert sampled(engine) == left
    assert rows(directory) == rows(undisturbed[1])


def test_the_size_of_parts_may_change(undisturbed: tuple[dict[str, Any], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "interrupted"
    with pytest.raises(KeyboardInterrupt):
        evaluate(directory, SeedEngine(1))
    engine = SeedEngine()
    assert "going on" not in capsys.readouterr().out
    assert evaluate(directory, engine, part_samples=100) == undisturbed[0]
    assert sampled(engine) == [[3, 4, 5]]
    assert capsys.readouterr().out.splitlines() == ["toy: going on after 2 of 5 problems kept", "toy: 5 of 5 problems"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"temperature": 1.0}, r"evaluation\.temperature was 0\.6 and is 1\.0; choose another run\.dir"),
        ({"samples": 8}, r"evaluation\.samples was 4 and is 8"),
        ({"preset": "qwen3"}, r"evaluation\.temperature was 0\.6 and is 0\.7, evaluation\.top_p was 0\.95 and is 0\.8, evaluation\.top_k"),
        ({"max_response_tokens": 7}, r"evaluation\.max_response_tokens was 3072 and is 7"),
    ],
)
def test_other_sampling_is_refused(undisturbed: tuple[dict[str, Any], Path], changed: dict[str, Any], message: str) -> None:
    engine = SeedEngine()
    with pytest.raises(UserError, match=rf"undisturbed: holds generations of another evaluation: {message}"):
        evaluate(undisturbed[1], engine, **changed)
    assert engine.asked == []


def test_other_problems_and_other_weights_are_refused(undisturbed: tuple[dict[str, Any], Path]) -> None:
    directory = undisturbed[1]
    shorter = PromptSet(PROBLEMS.prompts[:4], too_long=0)
    with pytest.raises(UserError, match=r"evaluation\.benchmarks\.toy was \"5 problems, digest \w+\" and is \"4 problems, "):
        check_settings(directory, generation_settings(config(), "toy", shorter, (STOP,)))
    with pytest.raises(UserError, match=r'model\.path was "weights a" and is "weights b"'):
        Generations(directory, {"model.path": "weights b"})
    assert weights_digest({"a": 1, "b": 2}) == weights_digest({"b": 2, "a": 1}) != weights_digest({"a": 2, "b": 1})


def test_damage_is_named(undisturbed: tuple[dict[str, Any], Path]) -> None:
    directory = undisturbed[1]
    (directory / "part_00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"part_00001\.parquet: not a part of an evaluation .*; remove it"):
        evaluate(directory, SeedEngine())
    (directory / "part_00001.parquet").unlink()
    with pytest.raises(UserError, match=r"part_00002\.parquet: does not go on with problem 2"):
        evaluate(directory, SeedEngine())
    (directory / "_settings.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match=r"settings\.json: not readable"):
        evaluate(directory, SeedEngine())
    (directory / "_settings.json").unlink()
    with pytest.raises(UserError, match=r"holds generations, but no _settings\.json to say of what"):
        evaluate(directory, SeedEngine())
