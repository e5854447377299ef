"""A benchmark's entry in eval/step_N.json, whoever sampled it."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from megatron_nsr.evaluation.evaluation_files import CONS_KEYS, PASS_KEYS
from megatron_nsr.evaluation.results import benchmark_result, render_result
from megatron_nsr.evaluation.votes import count_votes
from megatron_nsr.types import Outcome, Prompt, Reason, Verdict

RIGHT = Verdict(Outcome.CORRECT, Reason.MATCH, "5")
WRONG = Verdict(Outcome.WRONG, Reason.MISMATCH, "6")
CUT = Verdict(Outcome.WRONG, Reason.TRUNCATED)
LOST = Verdict(Outcome.NONE, Reason.TIMEOUT)


def problem(name: str, **extra: object) -> Prompt:
    return Prompt(id=name, text="", token_ids=(), answer="5", extra=extra)


PROMPTS = [
    problem("a", level="Level 1", type="Algebra"),
    problem("b", level="Level 2", type="Algebra", url="x"),
    problem("c", level="Level 2", type=None),
]
VERDICTS = [[RIGHT, WRONG, RIGHT, CUT], [WRONG, WRONG, RIGHT, LOST], [RIGHT] * 4]


def result() -> dict:
    return benchmark_result(PROMPTS, VERDICTS, count_votes(VERDICTS, None))


def test_scores_over_all_problems() -> None:
    found = result()
    assert found["pass_at_k"] == {"1": pytest.approx((0.5 + 0.25 + 1) / 3), "2": pytest.approx((5 / 6 + 0.5 + 1) / 3), "4": 1.0}
    assert found["cons_at_k"]["1"] == pytest.approx(found["pass_at_k"]["1"], abs=1e-12)
    assert found["cons_at_k"]["4"] == pytest.approx(2 / 3)  # 2 of 3 votes; 1 of 3; all
    assert (found["n"], found["no_verdict"], found["truncated"]) == (4, 1, 1)
    for value, low, high in (PASS_KEYS, CONS_KEYS):
        assert all(found[low][k] <= found[value][k] <= found[high][k] for k in ("1", "2", "4"))
    assert found["problems"][1] == {"id": "b", "correct": 1, "n": 4, "level": "Level 2", "type": "Algebra"}
    assert "type" not in found["problems"][2]
    assert json.loads(json.dumps(found)) == found


def test_scores_by_level_and_subject() -> None:
    groups = result()["groups"]
    assert {column: list(values) for column, values in groups.items()} == {"level": ["Level 1", "Level 2"], "type": ["Algebra"]}
    assert groups["level"]["Level 2"]["problems"] == 2
    assert groups["level"]["Level 2"]["pass_at_k"]["1"] == pytest.approx((0.25 + 1) / 2)
    assert groups["type"]["Algebra"]["pass_at_k"]["2"] == pytest.approx((5 / 6 + 0.5) / 2)
    assert groups["level"]["Level 1"]["cons_at_k"]["4"] == 1.0


def test_groups_weighed_by_their_problems_are_the_whole() -> None:
    found = result()
    for key in ("pass_at_k", "cons_at_k"):
        levels = found["groups"]["level"].values()
        assert sum(group["problems"] * group[key]["2"] for group in levels) / 3 == pytest.approx(found[key]["2"])


def test_what_cannot_be_known_is_absent() -> None:
    found = benchmark_result([problem("a")], [[RIGHT, WRONG]], None)
    assert not {"groups", *CONS_KEYS} & set(found)


def test_a_single_problem_has_no_interval() -> None:
    bounds = {*PASS_KEYS[1:], *CONS_KEYS[1:]}
    alone = benchmark_result(PROMPTS[:1], VERDICTS[:1], count_votes(VERDICTS[:1], None))
    levels = result()["groups"]["level"]
    assert not bounds & set(alone) and not bounds & set(levels["Level 1"]) and bounds < set(levels["Level 2"])
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(render_result("MATH", alone))
    text = console.export_text()
    assert "50.00 %" in text and " to " not in text


def test_uneven_problems_are_scored_up_to_the_fewest_samples() -> None:
    found = benchmark_result([problem("a"), problem("b")], [[RIGHT] * 5, [WRONG, RIGHT]], None)
    assert found["n"] == 2 and list(found["pass_at_k"]) == ["1", "2"]
    assert [entry["n"] for entry in found["problems"]] == [5, 2]
    with pytest.raises(ValueError, match="a sample of each"):
        benchmark_result([problem("a")], [[]], None)


def test_the_tables_show_curves_intervals_and_groups() -> None:
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(render_result("MATH", result()))
    text = console.export_text()
    for part in (
        "MATH: 3 problems, 4 samples each; 1 samples have no verdict",
        "58.33 %",
        "cons@k",
        "66.67 %",
        "Level 2",
        "Algebra",
        " to ",
    ):
        assert part in text
