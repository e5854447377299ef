"""Rollouts on one rank over an engine of a few lines: what is asked of it and what becomes of its answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from megatron_nsr.rollout.engine import Completion, Region, SampleRequest, Sampling
from megatron_nsr.rollout.rollouts import Rollouts, Verification
from megatron_nsr.rollout.seeds import sample_seed
from megatron_nsr.types import Prompt

STOP = 9
SAMPLING = Sampling(temperature=1.0, max_tokens=4, stop_ids=(STOP,))
PROMPTS = [Prompt(id=f"p{i}", text="", token_ids=(i + 1,), answer="") for i in range(3)]


class EchoEngine:
    """Answers with the prompt's id: samples of even seed stop, the others run out of budget."""

    dtype = torch.bfloat16

    def __init__(self) -> None:
        self.version: int | None = None
        self.holders = ["first start"]
        self.asked: list[SampleRequest] = []
        self.held: dict[Region, int] = {}
        self.verified: list[int | None] = []
        self.closed = False

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[Completion]:
        self.asked = list(requests)
        return [self._answer(request, request.seed + i, sampling) for request in requests for i in range(request.n)]

    def load_weights(self, tensors: Iterator[tuple[str, torch.Tensor]], version: int) -> int:
        self.version = version
        return sum(tensor.nbytes for _, tensor in tensors)

    def held_checksums(self) -> list[dict[Region, int]]:
        self.verified.append(self.version)
        return [self.held]

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> EchoEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, request: SampleRequest, seed: int, sampling: Sampling) -> Completion:
        ids = [*request.prompt_ids, STOP] if seed % 2 == 0 else list(request.prompt_ids) * sampling.max_tokens
        reason = "stop" if seed % 2 == 0 else "length"
        return Completion(np.array(ids, np.int32), np.full(len(ids), -0.5, np.float32), reason)


def no_checksums(_: torch.dtype) -> dict[str, int]:
    return {}


@pytest.fixture
def engine() -> EchoEngine:
    return EchoEngine()


@pytest.fixture
def rollouts(engine: EchoEngine) -> Rollouts:
    made = Rollouts(engine, lambda ids: "".join(map(str, ids)), run_seed=5)
    made.push(iter([]), 3, no_checksums)
    return made


def test_trajectories_come_by_prompt_then_sample(rollouts: Rollouts) -> None:
    got = rollouts.generate(PROMPTS, step=2, samples=2, sampling=SAMPLING, purpose="train")
    assert [(t.prompt, t.sample) for t in got] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert all(t.response_ids[0] == t.prompt + 1 and t.prompt_ids == PROMPTS[t.prompt].token_ids for t in got)


def test_the_text_leaves_the_stop_id_out_and_keeps_a_truncated_response_whole(rollouts: Rollouts) -> None:
    got = rollouts.generate(PROMPTS, step=2, samples=2, sampling=SAMPLING, purpose="train")
    for trajectory in got:
        digit = str(trajectory.prompt + 1)
        assert trajectory.text == (digit * 4 if trajectory.truncated else digit)
        assert trajectory.truncated == (trajectory.response_ids[-1] != STOP)
    assert {t.truncated for t in got} == {True, False}


def test_each_trajectory_carries_the_version_of_the_weights(rollouts: Rollouts) -> None:
    rollouts.push(iter([]), 4, no_checksums)
    got = rollouts.generate(PROMPTS, step=2, samples=1, sampling=SAMPLING, purpose="train")
    assert {t.weight_version for t in got} == {4}


def test_seeds_come_from_run_step_prompt_and_purpose(engine: EchoEngine, rollouts: Rollouts) -> None:
    rollouts.generate(PROMPTS, step=2, samples=2, sampling=SAMPLING, purpose="eval")
    assert [(r.seed, r.n) for r in engine.asked] == [(sample_seed(5, 2, p.id, 0, purpose="eval"), 2) for p in PROMPTS]


def test_no_prompts_are_no_trajectories(rollouts: Rollouts) -> None:
    assert rollouts.generate([], step=2, samples=2, sampling=SAMPLING, purpose="train") == []


def test_leaving_the_context_closes_the_engine(engine: EchoEngine, rollouts: Rollouts) -> None:
    with rollouts:
        pass
    assert engine.closed


@pytest.mark.parametrize(("verify_push", "verified"), [("always", [0, 1, 2]), ("first", [0]), ("never", [])])
def test_pushes_are_verified_as_asked(engine: EchoEngine, verify_push: Verification, verified: list[int]) -> None:
    rollouts = Rollouts(engine, str, run_seed=5, verify_push=verify_push)
    asked: list[torch.dtype] = []

    def checksums(dtype: torch.dtype) -> dict[str, int]:
        asked.append(dtype)
        return {}

    pushed = [rollouts.push(iter([("w", torch.zeros(3, version))]), version, checksums) for version in range(3)]
    assert pushed == [{"rollout/push_bytes": 12.0 * version, "rollout/engines": 1} for version in range(3)]
    assert engine.verified == verified
    assert asked == [torch.bfloat16] * len(verified)  # in the engine's type


def test_an_engine_that_was_started_again_is_verified_again(engine: EchoEngine) -> None:
    rollouts = Rollouts(engine, str, run_seed=5, verify_push="first")
    for version, holders in enumerate([["a", "b"], ["a"], ["a", "b"], ["a", "c"], []]):
        engine.holders = holders
        assert rollouts.push(iter([]), version, no_checksums)["rollout/engines"] == len(holders)
    assert engine.verified == [0, 3]


def test_an_engine_that_holds_other_weights_is_an_error_that_names_them(engine: EchoEngine) -> None:
    engine.held = {(f"w{i}", 0, 0): i for i in range(8)}
    policy = {f"w{i}": 7 for i in range(8)}
    with pytest.raises(RuntimeError, match=r"push of version 4: 7 tensors in rollout engine 0 are not .*: w0, w1, w2, w3, w4, \.\.\.$"):
        Rollouts(engine, str, run_seed=5).push(iter([]), 4, lambda _: policy)
