"""The same training command on one process and at parallel layouts: a complete run directory, and one rank's numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from examples import own_dataset
from megatron_nsr.config_files import load_config
from megatron_nsr.observability.metrics import METRICS, metric_meaning, read_metrics, steps_by
from megatron_nsr.observability.run_directory import RunDirectory
from megatron_nsr.observability.samples import read_samples
from tests.integration.small_run import REPOSITORY, Small, finished, start, state, values

LAYOUTS = {
    "tensor": (2, ["parallel.tensor=2", "parallel.sequence=true", "rollout.tensor_parallel=2"]),
    "context": (2, ["parallel.context=2"]),
    "pipeline": (2, ["parallel.pipeline=2"]),
    "virtual_pipeline": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "tensor_pipeline": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
}
# What a step's samples and both of its updates decide; the log-prob gap is rounding, and is bounded below.
COMPARED = (
    "reward/correct_ratio",
    "reward/truncated_ratio",
    "rollout/response_tokens_mean",
    "policy/loss",
    "policy/loss_nsr",
    "policy/grad_norm",
    "policy/entropy",
    "policy/logprob",
    "policy/logprob_nsr",
    "policy/grad_norm_head_nsr",
    "policy/kept_ratio",
    "policy/updates",
)


def check_complete(run: Path, steps: int) -> None:
    """Everything that a finished run leaves, and a policy that transformers reads."""
    paths = RunDirectory(run)
    assert state(run)["status"] == "done" and state(run)["step"] == steps
    assert load_config(paths.config).run.steps == steps
    assert {"versions", "hardware"} <= json.loads(paths.environment.read_text()).keys()
    logged = values(run)
    assert [step["step"] for step in logged] == list(range(1, steps + 1))
    assert all(0 < step["rollout/logprob_gap_max"] < 1e-4 for step in logged)
    assert [step["rollout/weight_version"] for step in logged] == list(range(steps))
    assert paths.latest.resolve() == paths.checkpoint(steps).resolve() and (paths.latest / "run.json").is_file()
    best = steps_by(paths.metrics, "eval/validation/pass@1")[0]
    assert paths.best.resolve() == paths.checkpoint(best).resolve() and (paths.best / "run.json").is_file()
    kept = {f"step_{step}" for step in (best, steps - 1, steps)}  # keep=2
    assert {path.name for path in paths.checkpoints.iterdir()} == {"latest", "best", *kept}
    evaluation = json.loads(paths.evaluation(steps).read_text())
    assert evaluation["benchmarks"]["puzzle"]["pass_at_k"].keys() == {"1", "2", "4"}
    assert evaluation["heldout_entropy"] == logged[-1]["heldout/entropy"]
    assert steps in paths.sample_steps()
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(paths.hf, output_loading_info=True, dtype=torch.float32)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_one_process_leaves_a_complete_run(undisturbed: Callable[[int], Path]) -> None:
    run = RunDirectory(undisturbed(1))
    check_complete(run.path, 10)
    fifth, tenth, final = ((folder / "model.safetensors").read_bytes() for folder in (run.export(5), run.export(10), run.hf))
    assert fifth != tenth == final and len(list(run.export(5).parent.iterdir())) == 2


def test_what_runs_log_is_what_the_registry_names(small: Small, undisturbed: Callable[[int], Path], tmp_path: Path) -> None:
    both_signs = (
        "objective.name=w_reinforce",
        *("data.prompts_per_step=64", "objective.mini_batch_prompts=64"),  # so many that some are correct
        "objective.rollout_correction=2.0",
        "objective.kl_coefficient=0.1",
        "logging.probe_every=1",
        "logging.sign_norms_every=1",
        "logging.kl_to_base_every=1",
        "run.steps=1",
    )
    finished(start(small.nsr(tmp_path / "run", *both_signs), tmp_path / "log"), 0)
    runs = (small.base, undisturbed(1), tmp_path / "run")
    logged = {name for run in runs for step in read_metrics(RunDirectory(run).metrics) for name in step} - {"step"}
    assert not [name for name in logged if metric_meaning(name) is None]
    patterns = {name for name in METRICS if "<" in name}
    critic = {name for name in METRICS if name.startswith("critic/")} | {"time/critic_s"}  # test_ppo_end_to_end.py
    assert METRICS.keys() - logged - patterns == {"policy/aux_loss"} | critic  # aux_loss: test_experts_end_to_end.py
    for metric in ("pass@4", "greedy_accuracy"):
        assert {f"eval/{benchmark}/{metric}" for benchmark in ("puzzle", "validation")} <= logged
    (step,) = values(tmp_path / "run")
    assert step["rollout/correction_mean"] == pytest.approx(1.0, abs=1e-4)  # the engine holds the policy's weights
    assert step["policy/grad_norm_head_psr"] < step["policy/grad_norm_head_nsr"]  # lambda is 0.1


def test_the_examples_train_together_at_a_parallel_layout(small: Small, tmp_path: Path) -> None:
    """An objective with a loss of its own, a reward of its own and a data set of its own, in one run; then its metrics in pandas.

    Each of its steps is evaluated, and so has a checkpoint that validation may choose.
    """
    run, data = tmp_path / "run", tmp_path / "own.jsonl"
    table = [json.loads(line) for line in small.data("train").read_text().splitlines()[:64]]
    lines = [f"{' '.join(map(str, row['numbers']))},{row['target']},{row['answer']}" for row in table]
    (tmp_path / "own.csv").write_text("\n".join(["numbers,target,operators", *lines]))
    assert own_dataset.convert(tmp_path / "own.csv", data) == 64
    own = ["objective.name=examples.own_objective:SequenceRatio", "reward.grader=examples.own_reward:FirstAttempt", f"data.train={data}"]
    ranks, overrides = LAYOUTS["tensor"]
    own += ["checkpoint.every=100", "evaluation.every=1", "run.steps=2"]
    finished(start(small.nsr(run, *own, *overrides), tmp_path / "log", ranks=ranks), 0)
    check_complete(run, 2)
    assert all(step["policy/updates"] == 2 and step["policy/grad_norm"] > 0 for step in values(run))
    samples = read_samples(RunDirectory(run).samples(2))
    assert {sample.prompt_id.partition("/")[0] for sample in samples} == {"own"}
    assert all((" no " in sample.response) <= (sample.outcome == "wrong") for sample in samples)
    read = subprocess.run(
        [sys.executable, "-m", "examples.read_metrics", str(run), str(small.base)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(name in read.stdout for name in ("eval/validation/pass@4", "rollout/response_tokens_mean_nsr", "policy/entropy"))


def test_data_parallel_ranks_train_as_one_process_does(undisturbed: Callable[[int], Path]) -> None:
    check_complete(undisturbed(2), 10)
    same_first_step(undisturbed(2), undisturbed(1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_trains_as_one_process_does(small: Small, undisturbed: Callable[[int], Path], tmp_path: Path, layout: str) -> None:
    ranks, overrides = LAYOUTS[layout]
    finished(start(small.nsr(tmp_path / "run", "run.steps=2", *overrides), tmp_path / "log", ranks=ranks), 0)
    check_complete(tmp_path / "run", 2)
    same_first_step(tmp_path / "run", undisturbed(1))
    (engines,) = {step["rollout/engines"] for step in values(tmp_path / "run")}
    assert engines == (1 if layout == "tensor" else ranks)  # each with prompts of its own, whatever the ranks share in training
    drawn = Counter(sample.prompt_id for sample in read_samples(RunDirectory(tmp_path / "run").samples(2)))
    assert len(drawn) == 16 and set(drawn.values()) == {4}


def same_first_step(run: Path, reference: Path) -> None:
    """Later steps may part where rounding flips a sampled token; the first one samples from equal weights."""
    got, want = values(run)[0], values(reference)[0]
    assert got.keys() == want.keys()
    for name in COMPARED:
        assert got[name] == pytest.approx(want[name], rel=1e-4, abs=1e-6), name
