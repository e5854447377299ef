"""What is held out of the training problems is judged by nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megatron_nsr import components
from megatron_nsr.config_files import parse_config
from megatron_nsr.data.prompts import PromptSet
from megatron_nsr.types import Prompt, UserError


def prompts(*texts: str) -> PromptSet:
    return PromptSet(tuple(Prompt(f"p/{index}", text, (1,), "2") for index, text in enumerate(texts)), too_long=0)


def set_apart(train: PromptSet, benchmark: PromptSet) -> tuple[PromptSet, dict[str, PromptSet]]:
    config = parse_config(
        {
            "run": {"dir": "unused", "steps": 1},
            "model": {"path": "unused"},
            "data": {"template": "plain", "prompts_per_step": 1, "validation": 2},
            "objective": {"name": "nsr", "mini_batch_prompts": 1},
        }
    )
    call: Any = components._set_apart
    return call(config, None, train, {"MATH": benchmark})


def test_problems_held_out_by_number_are_in_no_benchmark() -> None:
    train, validation = set_apart(prompts("1 + 1", "2 + 2", "3 + 3"), prompts("9 + 9"))
    assert len(train.prompts) == 1 and len(validation["validation"].prompts) == 2
    with pytest.raises(UserError, match=r"data\.validation=2: 2 of its 2 problems are in evaluation\.benchmarks\.MATH too"):
        set_apart(prompts("1 + 1", "2 + 2", "3 + 3"), prompts("1 + 1", "2 + 2", "3 + 3"))


@pytest.mark.parametrize("fp8", [True, False])
def test_a_push_is_judged_by_what_the_engine_makes_of_it(monkeypatch: pytest.MonkeyPatch, fp8: bool) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(components, "execute_push_plan", lambda plan, chunks: iter(()))
    monkeypatch.setattr(components, "policy_checksums", lambda *given, **options: asked.append((*given, options)))
    actor: Any = SimpleNamespace(chunks=["chunk"])
    rollouts: Any = SimpleNamespace(push=lambda tensors, version, checksums: checksums(torch.bfloat16) or {"version": version})
    parts = components.Components(
        actor, None, rollouts, None, None, cast(Any, None), cast(Any, "plan"), fp8, cast(Any, SimpleNamespace(push=bool))
    )
    assert parts.push(3) == {"version": 3}
    assert asked == [("plan", ["chunk"], torch.bfloat16, {"fp8_rows": fp8})]
