"""What an engine's ranks hold against what the policy holds."""

from __future__ import annotations

from megatron_nsr.rollout.engine import Region
from megatron_nsr.rollout.held_weights import wrong_tensors

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
POLICY = {"norm": 5, "down": 2**63 + 1, EMBEDDING: -7}  # any representative modulo 2**64
RANKS: list[dict[Region, int]] = [
    {("norm", 0, 0): 5, ("down", 0, 0): -(2**63), (EMBEDDING, 0, 0): -3},
    {("norm", 0, 0): 5, ("down", 0, 8): 1, (EMBEDDING, 4, 0): -4},
]


def test_parts_add_up_and_what_every_rank_holds_counts_once() -> None:
    assert wrong_tensors(POLICY, RANKS) == []


def test_a_part_that_is_wrong_missing_or_differs_between_ranks_is_named() -> None:
    assert wrong_tensors(POLICY, [RANKS[0], RANKS[1] | {("down", 0, 8): 2}]) == ["down"]
    assert wrong_tensors(POLICY, [RANKS[0], RANKS[1] | {("norm", 0, 0): 6}]) == ["norm"]
    assert wrong_tensors(POLICY, RANKS[:1]) == ["down", EMBEDDING]


def test_tensors_of_one_side_only_are_named() -> None:
    assert wrong_tensors(POLICY | {"bias": 0}, RANKS) == ["bias"]
    assert wrong_tensors(POLICY, [*RANKS, {("stray", 0, 0): 0}]) == ["stray"]


def test_a_tied_head_must_be_the_embedding() -> None:
    assert wrong_tensors(POLICY, [*RANKS, {(HEAD, 0, 0): -7}]) == []
    assert wrong_tensors(POLICY, [*RANKS, {(HEAD, 0, 0): -8}]) == [HEAD]
    assert wrong_tensors(POLICY | {HEAD: -8}, [*RANKS, {(HEAD, 0, 0): -8}]) == []
