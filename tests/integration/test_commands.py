"""The commands beside `train`, and training when a step teaches nothing or the engine holds other weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from megatron_nsr.cli import app
from megatron_nsr.config_files import load_config
from megatron_nsr.evaluator import evaluate
from megatron_nsr.observability.run_directory import RunDirectory
from megatron_nsr.types import UserError
from tests.browser import Chromium
from tests.integration.small_run import CONFIGS, Small, Started, finished, kill, start, state, values, wait_until
from tests.readable import read_page


def test_supervised_training_lowers_the_loss(small: Small) -> None:
    steps = values(small.base)
    assert steps[-1]["supervised/loss"] < 0.5 * steps[0]["supervised/loss"]
    assert steps[-1]["eval/puzzle/pass@1"] <= steps[-1]["eval/puzzle/pass@2"]
    assert not any(name.startswith(("reward/", "rollout/")) for step in steps for name in step)


def test_steps_that_teach_nothing_change_nothing_and_other_weights_in_the_engine_end_the_run(small: Small, tmp_path: Path) -> None:
    run, data, benchmark = tmp_path / "run", tmp_path / "train.jsonl", tmp_path / "benchmark.jsonl"
    verdicts = ["correct"] * 2 + ["correct", "never"] + ["wrong"] * 2 + ["raises"] * 2  # two problems a step
    rows = [{"question": "1 2 3 = 6", "answer": "+ +", "verdict": verdict} for verdict in verdicts]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmark.write_text(json.dumps(rows[0]) + "\n")
    overrides = [
        *("reward.grader=tests.integration.graders:Scripted", "reward.timeout_s=0.3", "reward.truncated=masked"),
        *(f"data.train={data}", "data.validation=null", "data.shuffle=false", "data.prompts_per_step=2", "objective.mini_batch_prompts=1"),
        *("rollout.samples_per_prompt=2", "objective.dropped_share=1.0", f"evaluation.benchmarks.puzzle={benchmark}"),
    ]

    output = finished(start(small.nsr(run, "run.steps=2", *overrides), tmp_path / "nothing.log"), 0)
    correct, never = values(run)
    assert f"run step 2/2 no verdict {never['reward/no_verdict_ratio']:.3f} (timeout {never['reward/timeout_ratio']:.3f}) " in output
    assert correct["reward/correct_ratio"] == correct["reward/fully_solved_ratio"] == 1 and correct["reward/no_verdict_ratio"] < 1
    assert correct["policy/entropy"] > 0 and correct["rollout/logprob_gap_max"] < 1e-4  # measured on dropped samples
    assert never["reward/no_verdict_ratio"] >= never["reward/timeout_ratio"] > 0 == never["reward/crash_ratio"]
    assert correct["rollout/logprob_psr"] < 0 and not [name for name in correct if name.startswith("rollout/") and name.endswith("_nsr")]
    for step in (correct, never):
        assert step["policy/updates"] == step["policy/kept_ratio"] == 0 and "policy/grad_norm" not in step
    before, after = (safetensors.torch.load_file(path / "hf" / "model.safetensors") for path in (small.base, run))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    wrong_weights = start(small.nsr(run, "run.steps=3", *overrides), tmp_path / "push.log", module="tests.integration.faulty_push")
    unverified = ["run.steps=3", "rollout.verify_push=never", *overrides]
    output = finished(wrong_weights, 1)
    message = "push of version 2: 1 tensors in rollout engine 0 are not those of the policy: model.norm.weight"
    assert output.count(message) == 1 and state(run)["status"] == "failed" and message in state(run)["reason"]
    assert len(values(run)) == 2 and RunDirectory(run).latest.resolve().name == "step_2"

    output = finished(start(small.nsr(run, *unverified), tmp_path / "gap.log", module="tests.integration.faulty_push"), 1)
    assert "rollout/logprob_gap_max is " in output and "above rollout.max_logprob_gap=0.0001" in output
    assert state(run)["status"] == "failed" and "rollout/logprob_gap_max" in state(run)["reason"]
    assert RunDirectory(run).latest.resolve().name == "step_2"

    output = finished(start(small.nsr(run, "run.steps=4", "checkpoint.every=4", *overrides), tmp_path / "raises.log"), 1)
    (said,) = [line for line in output.splitlines() if line.startswith("megatron-nsr: ")]
    assert said.startswith("megatron-nsr: reward.grader=tests.integration.graders:Scripted: none of the step's 4 responses has a verdict (")
    assert "the grader's last exception was ValueError: no licence; a checkpoint of step 3 is written" in said
    assert (state(run)["status"], state(run)["step"], len(values(run))) == ("failed", 3, 3)
    assert RunDirectory(run).latest.resolve().name == "step_3"


def test_a_checkpoint_and_its_export_evaluate_alike_even_after_a_kill(
    small: Small, undisturbed: Callable[[int], Path], benchmark_data: Path, tmp_path: Path
) -> None:
    trained, files = RunDirectory(undisturbed(1)), {"MATH": benchmark_data / "math" / "test.parquet", "puzzle": small.data("math_style")}
    overrides = [
        *(f"evaluation.benchmarks.{name}={file}" for name, file in files.items()),
        *("evaluation.limit=50", "evaluation.samples=1", "evaluation.max_response_tokens=16", "evaluation.temperature=0.3"),
        *("reward.grader=math_verify", "data.max_prompt_tokens=300", "evaluation.part_samples=5"),
    ]
    models = {0: trained.hf, 10: trained.checkpoint(10)}
    evaluations = {step: RunDirectory(tmp_path / str(step)) for step in models}

    def begin(step: int) -> Started:
        settings = [f"run.dir={evaluations[step].path}", f"model.path={models[step]}", *overrides]
        return start(["evaluate", str(CONFIGS / "quickstart.yaml"), *settings], tmp_path / f"{step}.log")

    started = {step: begin(step) for step in models}
    first_part = evaluations[0].generations(0, "MATH") / "part_00000.parquet"
    wait_until(first_part.is_file, started[0], "the first part was kept")
    kill(started[0])
    assert not evaluations[0].evaluation(0).exists()
    sampled = first_part.stat().st_mtime_ns
    started[0] = begin(0)
    results = {}
    for step, command in started.items():
        output = finished(command, 0)
        assert "Pass@" in output and "MATH" in output and "written to" in output and "NUMA binding" not in output
        assert f"{evaluations[step].path}: evaluate, " in output and "MATH 50 prompts" in output
        assert ("MATH: going on after " in output) == (step == 0)
        results[step] = json.loads(evaluations[step].evaluation(step).read_text())
        assert results[step].pop("step") == step and Path(results[step].pop("model")).name == ("step_10" if step else "hf")
    assert first_part.stat().st_mtime_ns == sampled
    assert results[0] == results[10]
    math = results[0]["benchmarks"]["MATH"]
    assert 0 < len(math["problems"]) <= 50 and len(math["problems"]) + math["too_long"] == min(50, parquet_rows(benchmark_data))
    assert math["no_verdict"] == 0 and results[0]["heldout_entropy"] > 0
    assert sum(level["problems"] for level in math["groups"]["level"].values()) == len(math["problems"]) and math["groups"]["type"]
    puzzle = pyarrow.parquet.ParquetDataset(evaluations[10].generations(10, "puzzle")).read().to_pylist()
    assert [row["problem_id"] for row in puzzle] == [problem["id"] for problem in results[10]["benchmarks"]["puzzle"]["problems"]]
    assert {row["weight_version"] for row in puzzle} == {10}
    with pytest.raises(
        UserError, match=r"eval/step_0/puzzle: holds generations of another evaluation: evaluation\.temperature was 0\.3 and is 0\.4"
    ):
        evaluate(
            load_config(
                CONFIGS / "quickstart.yaml",
                [f"run.dir={evaluations[0].path}", f"model.path={models[0]}", *overrides, "evaluation.temperature=0.4"],
            )
        )


def parquet_rows(benchmark_data: Path) -> int:
    return int(pyarrow.parquet.ParquetFile(benchmark_data / "math" / "test.parquet").metadata.num_rows)


def test_score_report_compare_and_doctor(small: Small, undisturbed: Callable[[int], Path], tmp_path: Path) -> None:
    samples, out, page = tmp_path / "samples.jsonl", tmp_path / "verdicts.jsonl", tmp_path / "report.html"
    rows = [("a", r"\boxed{1/2}", "0.5"), ("a", "no box", "0.5"), ("b", r"\boxed{3}", "4"), ("b", r"\boxed{4}", "4")]
    samples.write_text("".join(json.dumps({"question_id": q, "response": r, "answer": a}) + "\n" for q, r, a in rows))

    scored = CliRunner().invoke(app, ["score", str(samples), "--out", str(out)])
    assert scored.exit_code == 0 and "50.00 %" in scored.stdout
    assert [json.loads(line)["reason"] for line in out.read_text().splitlines()] == ["match", "no_box", "mismatch", "match"]

    reported = CliRunner().invoke(app, ["report", str(small.base), str(undisturbed(1)), "--out", str(page)])
    assert reported.exit_code == 0
    with Chromium() as chromium:
        for width in (1280, 400):
            seen = read_page(chromium, page, width)
            assert seen["found"] == {} and "Evaluation: puzzle" in seen["body"]

    compared = CliRunner().invoke(
        app, ["compare", str(undisturbed(1)), "--out", str(tmp_path / "all.csv"), "--plot", str(tmp_path / "a.png")]
    )
    assert compared.exit_code == 0 and "step 10" in compared.stdout and "puzzle,all,pass,4," in (tmp_path / "all.csv").read_text()

    diagnosed = CliRunner().invoke(app, ["doctor"])
    assert diagnosed.exit_code == 0 and "megatron-core" in diagnosed.stdout
