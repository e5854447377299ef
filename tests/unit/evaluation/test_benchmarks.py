"""What an evaluation samples, and the accuracy of greedy responses; what it leaves out. With real engines: tests/integration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from megatron_nsr.config import EvaluationConfig, RewardConfig
from megatron_nsr.data.prompts import PromptSet
from megatron_nsr.evaluation.benchmarks import Benchmarks
from megatron_nsr.phases import Phases
from megatron_nsr.rollout.engine import Sampling
from megatron_nsr.training.offload import Offload
from megatron_nsr.types import Outcome, Prompt, Reason, Trajectory, Verdict

PROMPTS = tuple(Prompt(f"p/{i}", f"{i}", (i,), str(i % 2)) for i in range(4))
VERDICTS = {"0": Outcome.CORRECT, "1": Outcome.WRONG, "2": Outcome.CORRECT, "3": Outcome.NONE}


class Rollouts:
    """Remembers what it was asked for; a greedy response says its prompt's text, the others nothing."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, Sampling, str]] = []

    def generate(self, prompts: Sequence[Prompt], *, step: int, samples: int, sampling: Sampling, purpose: str) -> list[Trajectory]:
        self.asked.append((samples, sampling, purpose))
        return [
            Trajectory(
                index,
                sample,
                prompt.token_ids,
                np.ones(2, np.int32),
                np.zeros(2, np.float32),
                "stop",
                0,
                "" if sampling.temperature else "2",
            )
            for index, prompt in enumerate(prompts)
            for sample in range(samples)
        ]


class Graders:
    """A response that says something gets its prompt's verdict; the others are wrong."""

    def grade(self, items: Sequence[tuple[str, Prompt]]) -> list[Verdict]:
        return [Verdict(VERDICTS[prompt.text] if response else Outcome.WRONG, Reason.MATCH) for response, prompt in items]


class Actor:
    """Measures nothing."""

    def measure_samples(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        return {"policy/entropy": float(len(trajectories)), "rollout/logprob_gap_mean": 0.0, "rollout/logprob_gap_max": 0.0}


def evaluated(rollouts: Rollouts, **settings: Any) -> dict[str, float]:
    parts: list[Any] = [rollouts, Graders(), Actor()]
    benchmarks = Benchmarks(
        {"a": PromptSet(PROMPTS, 0), "b": PromptSet(PROMPTS[:1], 0)},
        parts[0],
        parts[1],
        Phases(Offload([], "none"), 0),
        EvaluationConfig(samples=2, entropy_samples=3, **settings),
        RewardConfig(),
        training_temperature=0.9,
        max_response_tokens=8,
        stop_ids=(1,),
    )
    return benchmarks.run(5, parts[2]).metrics


def test_greedy_accuracy_counts_problems_that_one_plain_response_solves() -> None:
    rollouts = Rollouts()
    metrics = evaluated(rollouts, temperature=0.6, top_p=0.95, top_k=20)
    assert metrics["eval/a/greedy_accuracy"] == 0.5 and metrics["eval/b/greedy_accuracy"] == 1.0  # no verdict is not correct
    greedy = [(samples, sampling) for samples, sampling, _ in rollouts.asked if sampling.temperature == 0]
    assert greedy == [(1, Sampling(temperature=0.0, max_tokens=8, stop_ids=(1,)))] * 2


@pytest.mark.parametrize("greedy", [True, False])
def test_held_out_responses_are_drawn_as_in_training(greedy: bool) -> None:
    rollouts = Rollouts()
    metrics = evaluated(rollouts, greedy=greedy)
    plain = [asked for asked in rollouts.asked if asked[2] == "heldout"]
    assert plain == [(3, Sampling(temperature=0.9, max_tokens=8, stop_ids=(1,)), "heldout")] * 2
    assert metrics["heldout/entropy"] == 3 * 5
    assert ("eval/a/greedy_accuracy" in metrics) == greedy and len(rollouts.asked) == (6 if greedy else 4)
