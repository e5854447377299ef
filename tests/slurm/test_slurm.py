"""Real jobs of two nodes through nemo-run's Slurm executor: preempted, requeued and finished; and what else may happen to them."""

from __future__ import annotations

import json
from pathlib import Path

from tests.integration.small_run import state, steps_logged, values
from tests.slurm.conftest import WAIT_S, Sandbox, slurm, wait_until


def number() -> str:
    """Of the only job that Slurm knows to be waiting or running."""
    return slurm("squeue", "--noheader", "--format=%i")


def test_a_preempted_job_queues_again_goes_on_and_finishes(sandbox: Sandbox, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launched = sandbox.begin(run, "run.steps=80", "checkpoint.every=1000")
    wait_until(lambda: steps_logged(run) >= 2, launched, "two steps were made")
    job = number()
    slurm("scancel", "--signal=TERM", job)
    wait_until(lambda: slurm("squeue", "--noheader", "--format=%T", f"--jobs={job}") == "PENDING", launched, "the job queued again")
    assert state(run)["status"] == "stopped"
    stopped_at = state(run)["step"]
    assert 2 <= stopped_at < 80 and launched.poll() is None
    shown = sandbox.job("status", sandbox.name())
    assert "PENDING" in shown and f"{run}: stopped at step {stopped_at}" in shown
    slurm("scontrol", "update", f"jobid={job}", "StartTime=now")  # Slurm would wait two minutes
    wait_until(lambda: steps_logged(run) > stopped_at, launched, "the run went on")

    output, _ = launched.communicate(timeout=WAIT_S)
    assert launched.returncode == 0, output
    assert f"{run}: done at step 80" in output
    assert [step["step"] for step in values(run)] == list(range(1, 81))
    restarts = slurm("sacct", "--noheader", "--parsable2", "--allocations", "--duplicates", f"--jobs={job}", "--format=State")
    assert restarts.splitlines() == ["REQUEUED", "COMPLETED"]
    log = sandbox.home / "megatron_nsr" / sandbox.name() / "train.log"
    assert {line[:2] for line in log.read_text().splitlines() if "step" in line} == {"0:"}
    environment = json.loads((run / "environment.json").read_text())
    assert environment["versions"]["torch"]


def test_a_failing_rank_is_the_job_s_failure_with_its_last_lines(sandbox: Sandbox, tmp_path: Path) -> None:
    broken = 'cluster.setup=[\'[ "$SLURM_PROCID" != 1 ] || { echo "$SLURMD_NODENAME: no such device"; exit 9; }\']'
    launched = sandbox.begin(tmp_path / "run", "run.steps=3", broken)
    output, _ = launched.communicate(timeout=WAIT_S)
    assert launched.returncode == 1, output
    assert "1: node1: no such device" in output and "exit status 1" in output


def test_a_node_that_only_samples_serves_the_one_that_trains(sandbox: Sandbox, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launched = sandbox.begin_with_servers(run, "run.steps=2")
    output, _ = launched.communicate(timeout=WAIT_S)
    assert launched.returncode == 0, output
    assert steps_logged(run) == 2 and all(step["rollout/logprob_gap_max"] < 1e-4 for step in values(run))
    directory = sandbox.home / "megatron_nsr" / sandbox.name()
    assert "ready" in (directory / "serve.log").read_text()
    assert number() == ""


def test_what_slurm_refuses_is_wrong_input(sandbox: Sandbox, tmp_path: Path) -> None:
    launched = sandbox.begin(tmp_path / "run", "cluster.slurm.partition=nowhere")
    output, _ = launched.communicate(timeout=WAIT_S)
    assert launched.returncode == 2, output
    assert "megatron-nsr: cluster.slurm: sbatch refused the job: " in output and "partition" in output


def test_wrong_input_on_the_nodes_is_wrong_input_here(sandbox: Sandbox, tmp_path: Path) -> None:
    launched = sandbox.begin(tmp_path / "run", "run.steps=3", "data.train=nowhere.jsonl")
    output, _ = launched.communicate(timeout=WAIT_S)
    assert launched.returncode == 2, output
    assert "megatron-nsr: data.train=nowhere.jsonl: no such file" in output


def test_a_cancelled_job_stops_after_a_checkpoint_and_does_not_queue_again(sandbox: Sandbox, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launched = sandbox.begin(run, "run.steps=2000", "checkpoint.every=1000")
    wait_until(lambda: steps_logged(run) >= 1, launched, "a step was made")
    sandbox.job("cancel", sandbox.name())
    output, _ = launched.communicate(timeout=WAIT_S)
    assert launched.returncode == 3, output
    assert state(run)["status"] == "stopped" and number() == ""
