"""`megatron-nsr launch`: from a config and a cluster to a job that runs, and to its exit status.

May import: this package, config, config_files, models, rollout, observability, types.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_nsr.config_files import dump_config, load_config
from megatron_nsr.launch import nemo, scripts, skypilot
from megatron_nsr.launch.cluster import Cluster, check_here, load_cluster, split_overrides, unset_secrets
from megatron_nsr.launch.fits import check_fits
from megatron_nsr.launch.job import Job, find_job, new_job, progress, write_record
from megatron_nsr.launch.mounts import check_in_buckets, check_mounted
from megatron_nsr.launch.source import find_source
from megatron_nsr.launch.waiting import exit_status, has_ended, interrupt, wait_for
from megatron_nsr.types import UserError

# `launch` fills in what the servers announce; a run without servers is refused before.
SERVERS_TO_COME = ["rollout.mode=server", "rollout.servers=[http://announced-by-the-servers:8000]"]


def launch(
    config: Path,
    overrides: Sequence[str],
    *,
    cluster_file: Path | None,
    executor: str | None,
    dry_run: bool,
    detach: bool,
    follow: bool,
    uncommitted: bool,
) -> int:
    """Submits the job and waits for it; the exit status is the job's. Raises UserError for wrong input, before anything is submitted."""
    job = plan_job(config, overrides, cluster_file=cluster_file, executor=executor, dry_run=dry_run, uncommitted=uncommitted)
    if dry_run:
        print(describe(job), end="")
        if problem := unset_secrets(job.cluster):
            print(f"megatron-nsr: launch will refuse this: {problem}", file=sys.stderr)
        return 0
    if detach and job.cluster.executor != "slurm":
        raise UserError(
            f"--detach: a job of executor={job.cluster.executor} ends with its launch; use slurm, or nohup megatron-nsr launch ..."
        )
    nemo.require()
    prepare(job)
    if note := _without_gpus(job.cluster):
        print(note)
    print(f"job {job.id}: logs in {job.directory.path}, run in {job.record().run}", flush=True)
    wait = None if detach else partial(wait_for, job.directory, job.record(), follow=follow)
    try:
        state = nemo.submit(job, wait)
    except UserError:  # refused: there is no job
        shutil.rmtree(job.directory.path)
        raise
    if detach:
        print(f"megatron-nsr job status|logs|cancel {job.id}")
        return 0
    return exit_status(job.directory, job.record(), state, followed=follow)


def plan_job(
    config: Path, overrides: Sequence[str], *, cluster_file: Path | None, executor: str | None, dry_run: bool, uncommitted: bool
) -> Job:
    """Everything that is decided before anything is written. Raises UserError for whatever is wrong."""
    own, of_cluster = split_overrides(overrides)
    cluster = load_cluster(cluster_file, executor, of_cluster)
    settings = load_config(config, [*own, *(SERVERS_TO_COME if cluster.rollout else [])])
    cwd = Path.cwd()
    if cluster.executor == "skypilot":
        check_in_buckets(settings, cluster)
    elif cluster.image:
        check_mounted(settings, cluster, cwd)
    check_fits(settings, cluster, cwd)
    job = new_job(settings, cluster, find_source(cwd, uncommitted=uncommitted), cwd, dry_run=dry_run)
    if not dry_run:
        check_here(cluster)
    return job


def files(job: Job) -> dict[str, str]:
    """The scripts in the job's directory, by name."""
    executor = job.cluster.executor
    if executor == "slurm":
        return {"train.sh": scripts.slurm_rank(job)} | ({"serve.sh": scripts.slurm_server(job)} if job.cluster.rollout else {})
    if executor == "skypilot":
        there = skypilot.on_its_machines(job)
        return {"train.sh": scripts.skypilot_node(there), "task.yaml": skypilot.task(job), "start.sh": scripts.skypilot_start(job)}
    start = scripts.docker_start(job) if executor == "docker" else scripts.local_start(job)
    return {"train.sh": scripts.torchrun_node(job), "start.sh": start}


def describe(job: Job) -> str:
    """What would be submitted: the commit, every script, and for Slurm the one that sbatch gets."""
    source = job.source
    code = f"commit {source.commit}{' with uncommitted changes' if source.changed else ''}" if source else "none: what is installed there"
    parts = [f"# job {job.id} in {job.directory.path}\n# code: {code}\n# config: {job.directory.config}, resolved\n"]
    if note := _without_gpus(job.cluster):
        parts.append(f"# {note}\n")
    if job.cluster.secrets:
        parts.append(f"# secrets, by name: {', '.join(job.cluster.secrets)}\n")
    shown = files(job)
    if job.cluster.executor == "slurm":
        shown["sbatch"] = nemo.render_batch_script(job)
    parts += [f"\n===== {name} =====\n{text.rstrip()}\n" for name, text in shown.items()]
    return "".join(parts)


def prepare(job: Job) -> None:
    """Writes the job's directory."""
    job.directory.path.mkdir(parents=True)
    if job.source:
        job.source.ship(job.directory.code)
    job.directory.config.write_text(dump_config(job.config), encoding="utf-8")
    for name, text in files(job).items():
        (job.directory.path / name).write_text(text, encoding="utf-8")
    write_record(job)


def show_status(identity: str) -> None:
    """Prints what the job and its run are doing."""
    directory, record = find_job(identity)
    print(f"{record.id}: {_state(identity)}")
    print(progress(record.run))
    if (status := directory.status()) is not None:
        print(f"exit status {status}")


def show_logs(identity: str, *, follow: bool) -> None:
    """Prints the log so far; with `follow` until the job has ended."""
    directory, record = find_job(identity)
    if follow:
        wait_for(directory, record, lambda: _state(identity), follow=True)
    else:
        print("\n".join(directory.last_lines(10**6)))


def cancel(identity: str) -> None:
    """Asks the job to stop after a checkpoint, and not to queue again; what has not started is removed."""
    directory, record = find_job(identity)
    state, number = nemo.state(record) if record.executor == "slurm" else (_state(identity), None)
    if has_ended(state):
        print(f"{identity}: already ended")
        return
    interrupt(directory, number)
    print(f"{identity}: told to stop after a checkpoint")


def _without_gpus(cluster: Cluster) -> str | None:
    """What a user of a cluster may have forgotten."""
    if cluster.executor == "slurm" and cluster.gpus_per_node is None:
        return "cluster.gpus_per_node is not given: the job asks for no GPUs, and its ranks run on CPUs"
    return None


def _state(identity: str) -> str:
    directory, record = find_job(identity)
    if record.executor == "slurm":
        return nemo.state(record)[0]
    return "RUNNING" if directory.runs() else "ENDED"
