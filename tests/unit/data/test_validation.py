"""Validation problems are never trained on, whatever ids and copies a file has, and are the same in every run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_nsr.data.prompts import PromptSet
from megatron_nsr.data.validation import hold_out, require_disjoint
from megatron_nsr.types import Prompt, UserError

GOLDEN = ["p/7", "p/9", "p/17", "p/19"]  # of 20 problems, by seed 0


def prompts(*texts: str) -> PromptSet:
    return PromptSet(tuple(Prompt(f"p/{index}", text, (1,), "2") for index, text in enumerate(texts)), too_long=3)


def ids(found: PromptSet) -> list[str]:
    return [prompt.id for prompt in found.prompts]


@given(st.lists(st.sampled_from([f"problem {i}" for i in range(9)]), min_size=2, max_size=30), st.integers(1, 8), st.integers(0, 2**63 - 1))
def test_nothing_is_on_both_sides_and_only_copies_get_lost(texts: list[str], count: int, seed: int) -> None:
    data = prompts(*texts)
    different = set(texts)
    if count >= len(different):
        with pytest.raises(UserError, match=rf"data\.validation={count}: data\.train has only {len(different)} different problems"):
            hold_out(data, count, seed=seed)
        return
    train, validation = hold_out(data, count, seed=seed)
    held = [prompt.text for prompt in validation.prompts]
    assert len(held) == len(set(held)) == count
    assert [prompt for prompt in data.prompts if prompt.text not in held] == list(train.prompts)
    assert list(validation.prompts) == sorted(validation.prompts, key=lambda prompt: data.prompts.index(prompt))
    assert hold_out(data, count, seed=seed) == (train, validation)
    require_disjoint(validation, "validation.jsonl", {"data.train": train})


def test_the_seed_chooses_and_stays_what_it_was() -> None:
    data = prompts(*(f"problem {i}" for i in range(20)))
    train, validation = hold_out(data, 4, seed=0)
    assert ids(validation) == GOLDEN and (train.too_long, validation.too_long) == (3, 0)
    assert ids(hold_out(data, 4, seed=1)[1]) != GOLDEN


def test_a_file_that_shares_a_problem_with_what_is_trained_on_or_judged_by_is_refused() -> None:
    train, file = prompts("1 + 1", "2 + 2"), prompts("3 + 3", " 2  +\n2 ", "1 + 1")
    with pytest.raises(UserError, match=r"data\.validation=v\.jsonl: 2 of its 3 problems are in data\.train too, the first is p/1; take"):
        require_disjoint(file, "v.jsonl", {"evaluation.benchmarks.MATH": prompts("5 + 5"), "data.train": train})
    with pytest.raises(UserError, match=r"1 of its 1 problems are in evaluation\.benchmarks\.MATH too, the first is p/0"):
        require_disjoint(prompts("5 + 5"), "v.jsonl", {"data.train": train, "evaluation.benchmarks.MATH": prompts("5 + 5")})
