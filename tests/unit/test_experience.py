"""A step's data: rounds of dynamic sampling, and the objective of the step. Rollouts and graders are stand-ins."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_nsr import experience
from megatron_nsr.clock import PhaseClock
from megatron_nsr.config_files import parse_config
from megatron_nsr.experience import Experience, GradedRollouts
from megatron_nsr.objectives.registry import build_objective
from megatron_nsr.objectives.schedule import LambdaSchedule, ObjectiveSchedule
from megatron_nsr.types import NoVerdicts, Outcome, Prompt, Reason, Trajectory, Verdict

VERDICTS = {
    "+": Verdict(Outcome.CORRECT, Reason.MATCH),
    "-": Verdict(Outcome.WRONG, Reason.MISMATCH),
    "0": Verdict(Outcome.NONE, Reason.TIMEOUT),
    "x": Verdict(Outcome.NONE, Reason.CRASH),
    "t": Verdict(Outcome.NONE, Reason.TRUNCATED),
}


class Scripted:
    """Rollouts whose verdicts are the prompts' answers; it remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def generate(self, prompts: Sequence[Prompt], *, step: int, samples: int, **_: Any) -> list[Trajectory]:
        assert prompts, "an engine is never asked for nothing"
        self.asked.append([prompt.id for prompt in prompts])
        pairs = itertools.product(range(len(prompts)), range(samples))
        return [Trajectory(p, s, (1,), np.zeros(2, np.int32), np.zeros(2, np.float32), "stop", step - 1) for p, s in pairs]


@pytest.fixture(autouse=True)
def graded_by_the_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    def grade(trajectories: Sequence[Trajectory], prompts: Sequence[Prompt], *_: Any) -> list[Verdict]:
        return [VERDICTS[prompts[trajectory.prompt].answer[trajectory.sample]] for trajectory in trajectories]

    monkeypatch.setattr(experience, "grade_shared", grade)


def collect(
    batches: list[str], *, step: int = 1, schedule: ObjectiveSchedule | None = None, **objective: Any
) -> tuple[Experience, Scripted]:
    """batches: each as `id:verdicts` of its prompts, separated by blanks."""
    config = parse_config(
        {
            "run": {"dir": "unused", "steps": 9},
            "model": {"path": "unused"},
            "data": {"template": "plain", "prompts_per_step": 2},
            "rollout": {"samples_per_prompt": 2},
            "objective": {"name": "grpo", "mini_batch_prompts": 1} | objective,
        }
    )
    rollouts = Scripted()
    schedule = schedule or ObjectiveSchedule(build_objective(config.objective.name))
    build: Any = GradedRollouts
    return build(rollouts, SimpleNamespace(last_exception="E: x"), schedule, config, (0,)).collect(
        prompts_of(batches), step, PhaseClock()
    ), rollouts


def prompts_of(batches: list[str]) -> Iterator[list[Prompt]]:
    for batch in batches:
        yield [Prompt(name, "", (1,), verdicts) for name, _, verdicts in (entry.partition(":") for entry in batch.split())]


def test_without_dynamic_sampling_one_batch_is_taken_as_it_is() -> None:
    found, rollouts = collect(["a:++ b:--", "c:+- d:+-"])
    assert rollouts.asked == [["a", "b"]] and found.prompt_batches == 1
    assert [prompt.id for prompt in found.prompts] == ["a", "b"] and found.metrics["rollout/rounds"] == 1


def test_prompts_that_teach_nothing_give_way_until_none_is_left() -> None:
    found, rollouts = collect(["a:++ b:+-", "c:-- d:-0", "e:-+ f:+-", "g:+- h:+-"], sampling_rounds=9)
    assert rollouts.asked == [["a", "b"], ["c", "d"], ["e", "f"]] and found.prompt_batches == 3
    assert [prompt.id for prompt in found.prompts] == ["e", "b"]
    assert [(t.prompt, t.sample) for t in found.trajectories] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [verdict.outcome.value for verdict in found.verdicts] == ["wrong", "correct", "correct", "wrong"]
    assert [[sample.weight > 0 for sample in mini] for mini in found.batch.mini_batches] == [[False, True], [True, False]]


def test_the_number_of_rounds_is_limited_and_what_is_unmixed_stays() -> None:
    found, rollouts = collect(["a:++ b:--", "c:-- d:+-", "e:+- f:+-"], sampling_rounds=2)
    assert rollouts.asked == [["a", "b"], ["c", "d"]] and found.prompt_batches == 2
    assert [prompt.id for prompt in found.prompts] == ["d", "b"]


def test_nothing_is_replaced_while_nsr_warms_up() -> None:
    warm_up = ObjectiveSchedule(build_objective("grpo"), nsr_steps=1)
    batches = ["a:++ b:--", "c:+- d:+-"]
    asked = [collect(batches, step=step, schedule=warm_up, sampling_rounds=2)[1].asked for step in (1, 2)]
    assert asked == [[["a", "b"]], [["a", "b"], ["c", "d"]]]


def test_the_metrics_are_of_all_that_was_sampled() -> None:
    found, _ = collect(["a:++ b:++", "c:-- d:+-"], sampling_rounds=2, entropy_coefficient=0.0)
    assert found.metrics["reward/correct_ratio"] == pytest.approx(5 / 8)
    assert found.metrics["reward/fully_solved_ratio"] == pytest.approx(0.5)
    assert found.metrics["rollout/rounds"] == 2
    assert len(found.trajectories) == 4 and found.sampled_tokens == 8 * (1 + 2)  # a prompt of one token, a response of two


def test_a_prompt_that_a_new_epoch_brings_again_is_not_sampled_twice() -> None:
    found, rollouts = collect(["a:++ b:--", "b:-- c:+-", "d:+- e:+-"], sampling_rounds=2)
    assert rollouts.asked == [["a", "b"], ["c"]] and found.prompt_batches == 2
    assert [prompt.id for prompt in found.prompts] == ["c", "b"]


def test_data_that_has_no_other_prompts_end_the_rounds() -> None:
    found, rollouts = collect(["a:++ b:--", "b:-- a:++", "c:+- d:+-"], sampling_rounds=3)
    assert rollouts.asked == [["a", "b"]] and found.prompt_batches == 1  # the second batch is left for the next step
    assert [prompt.id for prompt in found.prompts] == ["a", "b"]


def test_a_step_without_any_verdict_ends_the_run_and_says_why() -> None:
    none = r"^reward\.grader=math_verify: none of the step's 4 responses has a verdict"
    with pytest.raises(NoVerdicts, match=rf"{none} \(timeout 2, crash 2\); the grader's last exception was E: x$"):
        collect(["a:00 b:xx"])
    assert collect(["a:00 b:x-"])[0].metrics["reward/no_verdict_ratio"] == 0.75
    with pytest.raises(NoVerdicts, match=r"none of the step's 8 responses has a verdict \(timeout 8\)$"):
        collect(["a:00 b:00", "c:00 d:00"], sampling_rounds=2)


def test_responses_that_nobody_graded_end_nothing() -> None:
    assert collect(["a:tt b:tt"])[0].metrics["reward/no_verdict_ratio"] == 1


def test_the_step_decides_the_objective() -> None:
    nsr, grpo = ObjectiveSchedule(build_objective("grpo"), nsr_steps=1), "a:+- b:++"
    first, second = (collect([grpo], step=step, schedule=nsr)[0] for step in (1, 2))
    assert [[s.weight for s in mini] for mini in first.batch.mini_batches] == [[-1.0], []]
    assert [[s.weight > 0 for s in mini] for mini in second.batch.mini_batches] == [[True, False], [False, False]]
    moving = ObjectiveSchedule(build_objective("nsr"), lambda_schedule=LambdaSchedule(0.0, 1.0, "linear", 0, 4))
    found, _ = collect([grpo], step=2, schedule=moving, name="w_reinforce")
    assert found.metrics["policy/lambda"] == 0.5 and "policy/lambda" not in second.metrics
    assert [s.weight for mini in found.batch.mini_batches for s in mini] == [0.5, -1.0, 0.5, 0.5]


def test_lengths_beside_the_budget_do_not_count() -> None:
    found, _ = collect(["a:+- b:++"], name="dr_grpo", mini_batch_prompts=2)
    assert {s.scale for mini in found.batch.mini_batches for s in mini} == {1 / (3072 * 4)}
