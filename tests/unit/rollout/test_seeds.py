"""Seeds of sampled responses."""

from __future__ import annotations

import pytest

from megatron_nsr.rollout.seeds import sample_seed


def test_golden_values_keep_old_runs_reproducible() -> None:
    assert sample_seed(0, 0, "p0", 0) == 3650066891371154842
    assert sample_seed(7, 12, "MATH/4", 3, purpose="eval") == 86330711681664460


def test_each_argument_changes_the_seed() -> None:
    base = sample_seed(1, 2, "a", 0)
    others = [
        sample_seed(2, 2, "a", 0),
        sample_seed(1, 3, "a", 0),
        sample_seed(1, 2, "b", 0),
        sample_seed(1, 2, "a", 1),
        sample_seed(1, 2, "a", 0, purpose="eval"),
        sample_seed(12, 2, "a", 0),
        sample_seed(1, 22, "a", 0),
    ]
    assert len({base, *others}) == 8


def test_numbers_and_prompt_id_do_not_run_into_one_another() -> None:
    assert sample_seed(1, 11, "1", 0) != sample_seed(11, 1, "1", 0)
    assert sample_seed(1, 1, "11", 0) != sample_seed(1, 11, "1", 0)


def test_seeds_of_many_samples_are_distinct_and_fit_63_bits() -> None:
    seeds = [sample_seed(3, step, f"p{prompt}", sample) for step in range(5) for prompt in range(200) for sample in range(16)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_samples_of_a_prompt_are_consecutive_as_the_engine_numbers_them() -> None:
    first = sample_seed(3, 1, "p", 0)
    assert [sample_seed(3, 1, "p", i) for i in range(4)] == [first, first + 1, first + 2, first + 3]


def test_a_negative_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="sample=-1 is negative"):
        sample_seed(0, 0, "p", -1)
