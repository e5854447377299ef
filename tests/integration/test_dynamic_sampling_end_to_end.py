"""Dynamic sampling and a reference policy in the real command: a run that was killed and goes on has an undisturbed one's numbers."""

from __future__ import annotations

from pathlib import Path

from tests.integration.small_run import Small, cut_short, finished, start, values

DAPO = ("objective.name=dapo", "objective.sampling_rounds=3", "objective.kl_coefficient=0.01", "logging.sign_norms_every=0")


def test_dapo_with_a_reference_policy_continues_as_if_it_had_never_ended(small: Small, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = small.nsr(run, "run.steps=3", *DAPO)
    finished(start(arguments, tmp_path / "log"), 0)
    logged, final = values(run), (run / "hf/model.safetensors").read_bytes()
    first, second, third = logged
    assert first["policy/kl_reference"] == 0 < third["policy/kl_reference"]
    rounds = [step["rollout/rounds"] for step in (first, second, third)]
    assert max(rounds) > 1 and all(1 <= count <= 3 for count in rounds)
    assert all(step["reward/fully_solved_ratio"] + step["reward/never_solved_ratio"] < 1 for step in (first, second, third))

    cut_short(run, 2)
    finished(start(arguments, tmp_path / "resumed.log"), 0)
    assert values(run) == logged and (run / "hf/model.safetensors").read_bytes() == final
