"""PPO through the training command, on two ranks: the critic learns first, then both; a run that was cut short ends as it would have."""

from __future__ import annotations

from pathlib import Path

from megatron_nsr.observability.metrics import METRICS, read_metrics
from tests.integration.small_run import Small, cut_short, finished, start, values
from tests.integration.test_layouts_end_to_end import LAYOUTS

STEPS, WARMUP = 3, 1


def test_the_critic_warms_up_both_learn_and_a_resumed_run_ends_as_the_undisturbed_one(small: Small, tmp_path: Path) -> None:
    ranks, layout = LAYOUTS["tensor"]
    settings = (
        "objective.name=ppo",
        "critic.learning_rate=1e-3",
        f"critic.warmup_steps={WARMUP}",
        "checkpoint.export_every=1",
        "objective.kl_coefficient=0.01",
    )
    run = tmp_path / "run"
    arguments = small.nsr(run, f"run.steps={STEPS}", *settings, *layout)
    finished(start(arguments, tmp_path / "log", ranks=ranks), 0)
    logged, final = values(run), (run / "hf/model.safetensors").read_bytes()
    check_steps(logged)
    assert {name for name in METRICS if name.startswith("critic/")} <= logged[-1].keys()
    assert all(step["time/critic_s"] > 0 for step in read_metrics(run / "metrics.jsonl"))
    base, *exports = ((folder / "model.safetensors").read_bytes() for folder in (small.base / "hf", *exported(run)))
    assert exports[0] == base and len({*exports}) == STEPS  # the warm-up left the policy as it was, the others did not

    cut_short(run, STEPS - 1)
    finished(start(arguments, tmp_path / "resumed.log", ranks=ranks), 0)
    assert values(run) == logged and (run / "hf/model.safetensors").read_bytes() == final


def check_steps(logged: list[dict[str, float]]) -> None:
    first, *later = logged
    assert first["policy/updates"] == 0 and first["critic/loss"] > 0 and first["critic/value_mean"] == 0
    assert first["policy/entropy"] > 0 and 0 < first["rollout/logprob_gap_max"] < 1e-4
    for step in later:
        assert step["policy/updates"] == 2 and step["policy/grad_norm"] > 0 and step["critic/value_mean"] != 0
        assert 0 < step["rollout/logprob_gap_max"] < 1e-4
    assert logged[-1]["critic/loss"] < first["critic/loss"]
    assert [step["policy/kl_reference"] > 1e-9 for step in logged] == [False, False, True]  # the policy's first update is the second step's


def exported(run: Path) -> list[Path]:
    return [run / "exports" / f"step_{step}" for step in range(1, STEPS + 1)]
