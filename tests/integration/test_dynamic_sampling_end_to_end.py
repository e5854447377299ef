"""Dynamic sampling and a reference policy in the real command: a run that is stopped and goes on has an undisturbed one's numbers."""

from __future__ import annotations

from pathlib import Path

from tests.integration.small_run import Small, finished, start, values

DAPO = ("objective.name=dapo", "objective.sampling_rounds=3", "objective.kl_coefficient=0.01", "logging.sign_norms_every=0")


def test_dapo_with_a_reference_policy_continues_as_if_it_had_never_ended(small: Small, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finished(start(small.nsr(whole, "run.steps=3", *DAPO), tmp_path / "whole.log"), 0)
    for steps in (2, 3):
        finished(start(small.nsr(parts, f"run.steps={steps}", *DAPO), tmp_path / f"{steps}.log"), 0)
    first, second, third = values(whole)
    assert values(parts)[2] == third
    assert (parts / "hf/model.safetensors").read_bytes() == (whole / "hf/model.safetensors").read_bytes()
    assert first["policy/kl_reference"] == 0 < third["policy/kl_reference"]
    rounds = [step["rollout/rounds"] for step in (first, second, third)]
    assert max(rounds) > 1 and all(1 <= count <= 3 for count in rounds)
    assert all(step["reward/fully_solved_ratio"] + step["reward/never_solved_ratio"] < 1 for step in (first, second, third))
