"""What `launch` refuses, before anything is written or submitted, with the line that helps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_nsr.launch import nemo
from megatron_nsr.launch.cluster import Cluster, check_here, load_cluster
from megatron_nsr.launch.command import launch, plan_job
from megatron_nsr.launch.job import Job, find_job
from megatron_nsr.launch.scripts import container_mounts
from megatron_nsr.launch.source import find_source
from megatron_nsr.observability.environment import describe_code
from megatron_nsr.types import UserError

CONFIG = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
NOT_DETACHED = {"detach": False, "follow": False, "uncommitted": False}
IMAGE = "cluster.image=example/image"


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clean checkout of one commit, and the working directory."""
    folder = tmp_path / "work"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "reward.py").write_text("version = 1\n")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path / "home"))
    return folder


def plan(*overrides: str, executor: str | None = None, uncommitted: bool = False) -> Job:
    return plan_job(CONFIG, overrides, cluster_file=None, executor=executor, dry_run=False, uncommitted=uncommitted)


@pytest.mark.parametrize(
    ("executor", "overrides", "message"),
    [
        ("slrum", [], "cluster: executor='slrum': input should be 'local', 'docker', 'slurm' or 'skypilot'"),
        (None, ["cluster.node=2"], "cluster: node: no such key; did you mean nodes?"),
        (None, ["cluster.nodes=0"], "cluster: nodes=0: input should be greater than or equal to 1"),
        (None, ["cluster.nodes=2"], "cluster: nodes=2: executor=local has one; use slurm or skypilot"),
        ("docker", [], "cluster: image: required with executor=docker, but not given"),
        ("docker", ["cluster.rollout.nodes=1", IMAGE], "cluster: rollout: only executor=slurm starts rollout servers"),
        ("slurm", ["cluster.rollout.node=1"], "rollout.node: no such key; did you mean nodes?"),
        ("slurm", ["cluster.mounts=[/data]"], "cluster: mounts: nothing is mounted without a container"),
        (None, ["cluster.environment.A=true"], "cluster: environment.A=True: give a string or a number"),
        (
            "slurm",
            ["cluster.slurm.options.exclusive=false"],
            "cluster: slurm.options.exclusive=False: give a string, a whole number, or true",
        ),
        ("slurm", ["cluster.secrets=[A]", "cluster.environment.A=1"], "cluster: secrets: A stands in environment too"),
        (
            "docker",
            [IMAGE, "model.path=/models/q"],
            "model.path=/models/q: the container does not see it; add its",
        ),
        ("skypilot", ["cluster.mounts=[/data]"], "cluster.mounts: /data is no bucket and path"),
        ("skypilot", ["cluster.mounts=['s3://a:/a']"], "run.dir=runs/quickstart/nsr: lies in none of cluster.mounts"),
        (
            "skypilot",
            ["cluster.mounts=['s3://a:/runs']", "run.dir=/runs/a"],
            "model.path=runs/quickstart/base/hf: lies in none of cluster.m",
        ),
        ("docker", [IMAGE, "cluster.mounts=['/a:/b:ro']"], "cluster.mounts: /a:/b:ro: write SOURCE:PATH with an absolute PATH"),
        (None, ["cluster.secrets=[NOT_SET_ANYWHERE]"], "cluster.secrets: NOT_SET_ANYWHERE not set in this shell; export it"),
        (None, ["cluster.gpus_per_node=2", "cluster.processes_per_node=4"], "cluster: processes_per_node=4: more than gpus_per_node=2"),
        (None, ["cluster.processes_per_node=3", "parallel.tensor=2"], "parallel.tensor=2 x parallel.pipeline=1 does not divide the 3"),
        (None, ["cluster.processes_per_node=3", "parallel.tensor=2"], "(ranks: cluster.nodes=1 x 3 a node)"),
        (None, ["rollout.tensor_parallel=2"], "rollout.tensor_parallel=2 does not divide the number of processes, 1"),
        (
            "slurm",
            ["cluster.rollout.nodes=1", "cluster.rollout.servers_per_node=3", "cluster.gpus_per_node=8", "rollout.tensor_parallel=4"],
            "cluster.rollout.servers_per_node=3 x rollout.tensor_parallel=4: more than cluster.gpus_per_node=8",
        ),
        ("slurm", ["cluster.slurm.time=four"], "cluster: slurm.time='four': give it as sbatch takes it"),
        ("slurm", ["cluster.slurm.time=12:00:00"], "cluster: slurm.time=43200: write it in quotes"),
        ("slurm", ["cluster.slurm.time='10'"], "cluster: slurm.grace_s=600 is not less than slurm.time=10: the run would be told to stop"),
        ("slurm", ["cluster.slurm.options.ntasks_per_node=2"], "ntasks_per_node is set by processes_per_node; leave it out"),
        ("slurm", ["cluster.slurm.options.N=2"], "N: give an option's long name"),
        (
            "slurm",
            ["cluster.slurm.options.cpus_per_task=2", "cluster.slurm.options.cpus-per-task=3"],
            "cpus-per-task stands there twice, as cpus_per_task and cpus-per-task",
        ),
        (None, ["objective.nam=nsr"], "config: objective.nam: no such key; did you mean name?"),
    ],
)
def test_wrong_input_is_one_line_that_names_the_field(checkout: Path, executor: str | None, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        plan(*overrides, executor=executor)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not (checkout.parent / "home").exists()


MODEL = {
    **{"model_type": "qwen2", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 6},
    **{"num_key_value_heads": 6, "vocab_size": 100, "max_position_embeddings": 512},
}


@pytest.mark.parametrize(
    ("executor", "overrides", "message"),
    [
        (None, ["cluster.processes_per_node=4", "parallel.tensor=4"], "parallel.tensor=4 does not divide num_attention_heads=6"),
        (None, ["parallel.pipeline=4"], "parallel.pipeline=4 does not divide num_hidden_layers=2"),
        (None, ["parallel.expert=2"], "parallel.expert=2: the model has no experts"),
        (
            None,
            ["cluster.processes_per_node=4", "rollout.tensor_parallel=4"],
            "rollout.tensor_parallel=4 does not divide num_attention",
        ),
        (
            "slurm",
            ["cluster.rollout.nodes=1", "rollout.tensor_parallel=4"],
            "rollout.tensor_parallel=4 does not divide num_attention",
        ),
        (
            "docker",
            [IMAGE, "cluster.mounts=[hf:/models]", "model.path=/models/m", "parallel.pipeline=4"],
            "parallel.pipeline=4 does not divide",
        ),
    ],
)
def test_a_layout_that_does_not_fit_the_model_is_refused(checkout: Path, executor: str | None, overrides: list[str], message: str) -> None:
    (checkout / "hf" / "m").mkdir(parents=True)
    (checkout / "hf" / "m" / "config.json").write_text(json.dumps(MODEL))
    with pytest.raises(UserError, match=message):
        plan("model.path=hf/m", *overrides, executor=executor)


@pytest.mark.parametrize("time", ["11", "10:01", "0:10:01", "04:00:00", "1-0", "1-12:30", "2-00:00:00", "UNLIMITED"])
def test_a_time_limit_is_any_that_sbatch_takes(time: str) -> None:
    assert Cluster.model_validate({"executor": "slurm", "slurm": {"time": time, "grace_s": 600}}).slurm.time == time


def test_uncommitted_changes_are_refused_and_shipped_when_told_without_touching_the_checkout(checkout: Path, tmp_path: Path) -> None:
    first = plan().source
    assert first and first.commit == git(checkout, "rev-parse", "HEAD")
    (checkout / "reward.py").write_text("version = 2\n")
    (checkout / "notes.txt").write_text("not tracked")
    with pytest.raises(UserError, match=r"uncommitted changes in reward\.py; commit them, or launch with --uncommitted"):
        plan()
    before = git(checkout, "status", "--porcelain")
    source = plan(uncommitted=True).source
    assert source and source.changed
    source.ship(tmp_path / "new")
    first.ship(tmp_path / "old")
    for name, shipped in (("new", source), ("old", first)):
        described = describe_code(tmp_path / name / "megatron_nsr" / "observability" / "environment.py")
        assert described == {"commit": shipped.commit, "dirty": shipped.changed}
    assert (tmp_path / "new" / "reward.py").read_text() == "version = 2\n" and not (tmp_path / "new" / "notes.txt").exists()
    assert (tmp_path / "old" / "reward.py").read_text() == "version = 1\n"
    assert git(checkout, "status", "--porcelain") == before and git(checkout, "stash", "list") == ""


def test_outside_a_checkout_only_what_is_installed_can_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(UserError, match="no git checkout with a commit; launch from one, or with --uncommitted"):
        find_source(tmp_path, uncommitted=False)
    assert find_source(tmp_path, uncommitted=True) is None


@pytest.mark.parametrize("secrets", ["[KEY=sesame]", "{KEY: sesame}", "[{KEY: sesame}]", "sesame", "[a-sesame]", "[[sesame]]"])
def test_a_secret_s_value_is_never_repeated(tmp_path: Path, secrets: str) -> None:
    (tmp_path / "cluster.yaml").write_text(f"secrets: {secrets}\n")
    for path, overrides in ((tmp_path / "cluster.yaml", []), (None, [f"secrets={secrets}"]), (None, [f"secrets=[{secrets}"])):
        with pytest.raises(UserError, match=r"cluster\.secrets: give names alone") as refused:
            load_cluster(path, None, overrides)
        assert "sesame" not in str(refused.value)


def test_a_job_of_slurm_without_gpus_says_so(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for overrides, told in (([], 1), (["cluster.gpus_per_node=1"], 0)):
        assert launch(CONFIG, overrides, cluster_file=None, executor="slurm", dry_run=True, **NOT_DETACHED) == 0
        assert capsys.readouterr().out.count("# cluster.gpus_per_node is not given: the job asks for no GPUs") == told


def test_a_relative_mount_is_below_the_working_directory(checkout: Path) -> None:
    job = plan_job(
        CONFIG, [IMAGE, "cluster.mounts=[../hf:/models,../data]"], cluster_file=None, executor="docker", dry_run=True, uncommitted=False
    )
    tmp = checkout.parent
    assert container_mounts(job)[2:] == [f"{tmp}/hf:/models", f"{tmp}/data:{tmp}/data"]


def test_a_dry_run_warns_of_a_secret_that_is_not_set(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["cluster.secrets=[NOT_SET_ANYWHERE]"]
    assert launch(CONFIG, overrides, cluster_file=None, executor=None, dry_run=True, **NOT_DETACHED) == 0
    assert "launch will refuse this: cluster.secrets: NOT_SET_ANYWHERE not set in this shell" in capsys.readouterr().err


def test_a_secret_that_is_set_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "value")
    check_here(Cluster(secrets=["MY_TOKEN"]))


@pytest.mark.parametrize(("executor", "program"), [("slurm", "sbatch"), ("docker", "docker"), ("skypilot", "sky")])
def test_a_program_that_is_not_here(executor: str, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster.model_validate({"executor": executor, "image": "example/image"})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=f"cluster.executor={executor}: there is no {program} here; "):
        check_here(cluster)
    (tmp_path / program).write_text("#!/bin/sh\n")
    (tmp_path / program).chmod(0o755)
    check_here(cluster)


def test_a_nemo_run_that_does_not_import_is_named_with_the_command_that_installs_it_and_leaves_no_job(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nemo_run", None)
    with pytest.raises(UserError, match=r"nemo-run does not import \(.*\): pip install --no-deps -r requirements/launch-py3\d+\.lock"):
        launch(CONFIG, [], cluster_file=None, executor=None, dry_run=False, **NOT_DETACHED)
    assert not (checkout.parent / "home").exists()


def test_a_job_that_sbatch_refuses_leaves_nothing(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise UserError("cluster.slurm: sbatch refused the job")

    monkeypatch.setattr(nemo, "require", lambda: None)
    monkeypatch.setattr(nemo, "submit", refuse)
    with pytest.raises(UserError, match="sbatch refused the job"):
        launch(CONFIG, [], cluster_file=None, executor=None, dry_run=False, **NOT_DETACHED)
    assert list((checkout.parent / "home" / "megatron_nsr").iterdir()) == []


def test_a_job_that_was_never_launched(checkout: Path) -> None:
    with pytest.raises(UserError, match=r"job nsr_1: not in .*home/megatron_nsr; there is none"):
        find_job("nsr_1")


def test_a_cluster_s_file_may_include_another_and_the_command_line_has_the_last_word(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("executor: slurm\nslurm: {account: us}\n")
    (tmp_path / "four.yaml").write_text("include: site.yaml\nnodes: 4\ngpus_per_node: 8\n")
    cluster = load_cluster(tmp_path / "four.yaml", None, ["slurm.partition=h200", "nodes=2"])
    assert (cluster.executor, cluster.nodes, cluster.ranks_per_node) == ("slurm", 2, 8)
    assert (cluster.slurm.account, cluster.slurm.partition) == ("us", "h200")
