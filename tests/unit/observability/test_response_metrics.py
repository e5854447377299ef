"""What a step's responses say: against numbers counted by hand, and against loops on random steps; one sign missing, or both."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_nsr.observability.metrics import METRICS
from megatron_nsr.observability.response_metrics import response_metrics
from megatron_nsr.types import Outcome, Reason, Trajectory, Verdict

CORRECT, WRONG, NONE = Outcome.CORRECT, Outcome.WRONG, Outcome.NONE
REASONS = {CORRECT: Reason.MATCH, WRONG: Reason.MISMATCH, NONE: Reason.TIMEOUT}
Response = tuple[Outcome, int, float, bool, str | None]  # outcome, tokens, log-prob of each token, truncated, answer


def measured(responses: list[Response], samples: int) -> dict[str, float]:
    trajectories = [
        Trajectory(
            index // samples,
            index % samples,
            (1, 2),
            np.zeros(length, np.int32),
            np.full(length, logprob, np.float32),
            "length" if truncated else "stop",
            3,
        )
        for index, (_, length, logprob, truncated, _) in enumerate(responses)
    ]
    verdicts = [Verdict(outcome, REASONS[outcome], answer) for outcome, _, _, _, answer in responses]
    return response_metrics(trajectories, verdicts, samples)


def test_a_step_counted_by_hand() -> None:
    got = measured(
        [
            *((CORRECT, 2, -1.0, False, "7"), (WRONG, 8, -0.5, True, None), (WRONG, 4, -0.25, False, "8"), (NONE, 6, -9.0, False, "7")),
            *((CORRECT, 1, -4.0, False, "1"), (CORRECT, 1, -2.0, False, "1"), (CORRECT, 1, -2.0, False, "1"), (NONE, 1, -2.0, False, None)),
        ],
        samples=4,
    )
    assert got == {
        "reward/no_verdict_ratio": 0.25,
        "reward/timeout_ratio": 0.25,
        "reward/crash_ratio": 0.0,
        "reward/bad_gold_ratio": 0.0,
        "reward/correct_ratio": pytest.approx(4 / 6),
        "reward/fully_solved_ratio": 0.5,
        "reward/never_solved_ratio": 0.0,
        "reward/truncated_ratio": 0.125,
        "reward/truncated_ratio_nsr": 0.5,
        "reward/unique_answers_mean": 1.5,
        "rollout/response_tokens_mean": 3.0,
        "rollout/response_tokens_max": 8.0,
        "rollout/response_tokens_mean_psr": 1.25,
        "rollout/response_tokens_mean_nsr": 6.0,
        "rollout/logprob_psr": pytest.approx(-2.0),  # over tokens, not over responses
        "rollout/logprob_nsr": pytest.approx(-5 / 12),
        "rollout/weight_version": 3.0,
    }
    assert got.keys() <= METRICS.keys()


@pytest.mark.parametrize(
    ("outcome", "present", "absent"),
    [(CORRECT, "_psr", "_nsr"), (WRONG, "_nsr", "_psr"), (NONE, None, "_psr"), (NONE, None, "_nsr")],
)
def test_a_sign_without_a_response_has_no_entry(outcome: Outcome, present: str | None, absent: str) -> None:
    got = measured([(outcome, 5, -1.0, False, "3")] * 4, samples=2)
    assert not [name for name in got if name.endswith(absent)]
    assert present is None or got[f"rollout/response_tokens_mean{present}"] == 5.0
    assert ("reward/correct_ratio" in got) == (outcome is not NONE)
    assert got["reward/no_verdict_ratio"] == float(outcome is NONE)


def test_a_grader_that_tells_no_answers_has_no_count_of_them() -> None:
    assert "reward/unique_answers_mean" not in measured([(WRONG, 5, -1.0, False, None)] * 2, samples=2)


@given(samples=st.integers(1, 4), prompts=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_random_steps_agree_with_loops(samples: int, prompts: int, seed: int) -> None:
    draw = random.Random(seed)

    def response() -> Response:
        outcome = draw.choice([CORRECT, WRONG, NONE])
        return outcome, draw.randint(1, 9), -draw.randint(0, 32) / 4, draw.random() < 0.5, draw.choice(["1", "2", None])

    groups = [[response() for _ in range(samples)] for _ in range(prompts)]
    responses = [response for group in groups for response in group]
    got = measured(responses, samples)
    for sign, outcome in (("psr", CORRECT), ("nsr", WRONG)):
        mine = [response for response in responses if response[0] is outcome]
        if mine:
            tokens = sum(length for _, length, _, _, _ in mine)
            assert got[f"rollout/response_tokens_mean_{sign}"] == pytest.approx(tokens / len(mine))
            logprob = math.fsum(length * logprob for _, length, logprob, _, _ in mine) / tokens
            assert got[f"rollout/logprob_{sign}"] == pytest.approx(logprob, abs=1e-6)
    if any(response[4] for response in responses):
        unique = [len({answer for *_, answer in group if answer is not None}) for group in groups]
        assert got["reward/unique_answers_mean"] == pytest.approx(sum(unique) / len(groups))
    judged = [[response[0] for response in group if response[0] is not NONE] for group in groups]
    if any(judged):
        solved, never = (sum(bool(group) and set(group) == {outcome} for group in judged) for outcome in (CORRECT, WRONG))
        assert got["reward/fully_solved_ratio"] == pytest.approx(solved / len(groups))
        assert got["reward/never_solved_ratio"] == pytest.approx(never / len(groups))
