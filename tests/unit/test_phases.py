"""What engine and policy are told in each phase of a step, in which order. vLLM sleeps on CUDA alone: here its API is recorded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_nsr.phases import Phases
from megatron_nsr.rollout.vllm_engine import VllmEngine
from megatron_nsr.training.offload import Offload


class RecordingLLM:
    """Stands for vllm.LLM, of whose API it has what a colocated step calls."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def sleep(self, level: int = 1) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.calls.append(f"wake {', '.join(tags or ['everything'])}")

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        list(kwargs["weights_iterator"])
        self.calls.append(method)

    def reset_prefix_cache(self) -> bool:
        return True


class RecordingOffload(Offload):
    def __init__(self, calls: list[str]) -> None:
        super().__init__([], "all")
        self.calls = calls

    def take_away(self) -> None:
        self.calls.append("policy away")

    def bring_weights(self) -> None:
        self.calls.append("policy weights")

    def bring_all(self) -> None:
        self.calls.append("policy whole")


def engine_over(llm: RecordingLLM) -> VllmEngine:
    engine = object.__new__(VllmEngine)
    vars(engine).update(_llm=llm, _version=0, _expected=frozenset(["w"]), _vocabulary=4, _copy_embedding=False, _on_cpu=False)
    return engine


class Step:
    """A colocated run's parts, up to what they tell each other."""

    def __init__(self, sleep_level: int) -> None:
        self.calls: list[str] = []
        self.phases, self.engine = Phases(RecordingOffload(self.calls), sleep_level), engine_over(RecordingLLM(self.calls))
        self.phases.engine = self.engine

    def push(self, version: int) -> None:
        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            yield "w", torch.ones(1)

        self.phases.push()
        self.engine.load_weights(tensors(), version)

    def told(self) -> list[str]:
        calls = list(self.calls)
        self.calls.clear()
        return calls


@pytest.mark.parametrize("level", [1, 2])
def test_a_step_gives_memory_to_who_needs_it_and_the_kv_cache_comes_last(level: int) -> None:
    step = Step(level)
    step.phases.train()
    step.push(0)
    step.told()
    for version in (1, 2):
        step.phases.sample()
        step.phases.train()
        step.push(version)
        assert step.told() == [
            *("policy away", "wake kv_cache"),  # sampling; the weights were awake since the push
            *(f"sleep {level}", "policy whole"),  # the update
            *("policy weights", "wake weights", "reload_weights"),  # the push
        ]


def test_weights_that_are_needed_again_are_never_dropped() -> None:
    step = Step(2)
    step.phases.train()
    step.push(1)
    step.phases.inspect()  # a checkpoint between push and sampling
    step.phases.sample()
    step.phases.inspect()  # an evaluation measures the policy
    step.phases.sample()
    assert "sleep 2" in step.told()[:1]
    assert step.engine.version == 1


def test_dropped_weights_are_no_version_to_sample_from() -> None:
    step = Step(2)
    step.push(1)
    step.phases.train()
    assert step.engine.version is None
    step.push(2)
    assert step.engine.version == 2


def test_an_engine_that_stays_awake_is_told_nothing() -> None:
    step = Step(0)
    step.phases.sample()
    step.phases.train()
    step.push(1)
    step.phases.inspect()
    assert step.told() == ["policy away", "policy whole", "policy weights", "reload_weights", "policy whole"]
