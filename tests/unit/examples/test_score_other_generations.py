"""The example that scores somebody else's generations, as a user starts it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.score_other_generations import main


def test_another_tool_s_outputs_are_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems = [
        {"idx": 0, "question": "What is 2+3?", "gt": "5", "level": "Level 1", "code": [r"\boxed{5}", r"\boxed{6}", r"\boxed{5.0}", "five"]},
        {"idx": 1, "question": "Halve 1.", "gt": r"\frac12", "level": "Level 2", "code": [r"\boxed{0.5}", r"\boxed{1}", "", r"\boxed{2}"]},
    ]
    (tmp_path / "outputs.json").write_text(json.dumps(problems))
    main([str(tmp_path / "outputs.json"), "--out", str(tmp_path / "scored")])
    printed = capsys.readouterr().out
    assert "37.50 %" in printed and "level=Level 1: Pass@1 0.500" in printed and "level=Level 2: Pass@1 0.250" in printed
    scores = json.loads((tmp_path / "scored" / "scores.json").read_text())["benchmarks"]["MATH"]
    assert scores["pass_at_k"]["4"] == 1.0
    assert scores["groups"]["level"]["Level 1"]["cons_at_k"]["4"] == 1.0  # two of three votes
    assert scores["groups"]["level"]["Level 2"]["cons_at_k"]["4"] == pytest.approx(1 / 3)  # three answers, a vote each
    assert len((tmp_path / "scored" / "verdicts.jsonl").read_text().splitlines()) == 8
