"""The only module that knows nemo-run: experiments of one job, on its Slurm executor or its local one.

May import: this package, platform, types, nemo_run.

Docker and SkyPilot are commands that the local executor runs. nemo-run's own executors for them write the values of environment
variables, and so of secrets, into its files (core/execution/docker.py and skypilot.py of 0.11.1), and its Docker executor keeps SIGTERM
from the trainer. SkyPilot needs versions of click and uvicorn that vLLM's environment cannot have: as a command it may live elsewhere.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_nsr.launch.job import DRY_RUN, Job, JobRecord, nemo_run_home
from megatron_nsr.launch.scripts import container_mounts, slurm_batch_lines
from megatron_nsr.platform.doctor import lock_file
from megatron_nsr.types import UserError

NAME_PREFIX = "megatron_nsr."  # of jobs in squeue; nemo-run reads what comes after the last dot
MONITOR_S = 5  # how often a job with rollout servers looks whether its trainer has ended
ENDED = {"SUCCEEDED": True, "FAILED": False, "CANCELLED": False}  # nemo-run's (torchx's) last states: did the job succeed

Wait = Callable[[Callable[[], str]], None]


def require() -> None:
    """Raises UserError with the command that installs nemo-run where it, or what its import needs, is missing."""
    _nemo_run()


def render_batch_script(job: Job) -> str:
    """The script that sbatch gets, as nemo-run writes it; nothing is kept."""
    run = _nemo_run()
    with tempfile.TemporaryDirectory() as scratch, _experiment(job, base=Path(scratch)) as experiment:
        _add(run, experiment, job)
        with _quietly():
            experiment.dryrun(log=False, delete_exp_dir=False)
        (script,) = Path(scratch).rglob("*_sbatch.sh")
        return script.read_text()


def submit(job: Job, wait: Wait | None) -> str:
    """Starts the job and returns its last state; `wait` is called meanwhile with what tells the state of the moment.

    wait: None leaves the job to itself, which Slurm's jobs bear and jobs of this machine do not. Raises UserError where sbatch refuses it.
    """
    run = _nemo_run()
    with _experiment(job, base=nemo_run_home()) as experiment:
        _add(run, experiment, job)
        try:
            with _quietly():
                experiment.run(detach=job.cluster.executor == "slurm")
        except Exception as error:
            if (refused := getattr(error, "result", None)) is None:
                raise
            raise UserError(f"cluster.slurm: {refused.command.split()[0]} refused the job: {' '.join(refused.stderr.split())}") from None
        if wait is not None:
            wait(lambda: _state(experiment)["status"])
        return str(_state(experiment)["status"])


def state(record: JobRecord) -> tuple[str, str]:
    """(nemo-run's state of a job that was launched before, the number that Slurm gave it)."""
    found = _state(_nemo_run().Experiment.from_id(record.id))
    return str(found["status"]), str(found["job_id"])


def _add(run: Any, experiment: Any, job: Job) -> None:
    path = job.directory.path
    if job.cluster.executor != "slurm":
        experiment.add(run.Script(path=str(path / "start.sh")), executor=run.LocalExecutor(), name=job.title)
    elif job.cluster.rollout is None:
        experiment.add(run.Script(path=str(path / "train.sh")), executor=_slurm(run, job, job.cluster.nodes), name=job.title)
    else:
        rollout = job.cluster.rollout
        trainer = _slurm(run, job, job.cluster.nodes, heterogeneous=True)
        servers = _slurm(run, job, rollout.nodes, heterogeneous=True, ranks=rollout.servers_per_node, log=job.directory.server_log)
        scripts = [run.Script(path=str(path / name)) for name in ("train.sh", "serve.sh")]
        experiment.add(scripts, executor=[trainer, servers], name=job.title)


def _slurm(run: Any, job: Job, nodes: int, *, heterogeneous: bool = False, ranks: int | None = None, log: Path | None = None) -> Any:
    cluster, settings = job.cluster, job.cluster.slurm
    # nemo-run lets srun end a step a minute after its first rank has left, but rank 0 may still be exporting: the last --wait counts.
    output = [f"--output={log or job.directory.log}", "--open-mode=append", "--label", "--wait=0"]
    return run.SlurmExecutor(
        account=settings.account,
        partition=settings.partition,
        qos=settings.qos,
        time=settings.time,
        signal=f"TERM@{settings.grace_s}",
        nodes=nodes,
        ntasks_per_node=ranks or cluster.ranks_per_node,
        gpus_per_node=cluster.gpus_per_node,
        container_image=cluster.image,
        container_mounts=container_mounts(job) if cluster.image else [],
        container_env=list(cluster.secrets) or None,  # otherwise the image's own value of a variable would win
        job_name_prefix=NAME_PREFIX,
        additional_parameters=dict(settings.options) or None,
        srun_args=output,
        setup_lines=slurm_batch_lines(job),
        # nemo-run takes what it copied to be below this very directory
        tunnel=run.LocalTunnel(job_dir=str(nemo_run_home() / "experiments")),
        packager=run.Packager(),  # the commit lies in the job's directory
        heterogeneous=heterogeneous,
        wait_time_for_group_job=0,
        monitor_group_job_wait_time=MONITOR_S,
        poll_estimated_start_time=False,
    )


@contextmanager
def _experiment(job: Job, *, base: Path) -> Iterator[Any]:
    experiment = _nemo_run().Experiment(
        job.title,
        id=job.id,
        base_dir=str(base),
        log_level="ERROR",
        clean_mode=True,
        enable_goodbye_message=False,
        skip_status_at_exit=True,
        serialize_metadata_for_scripts=DRY_RUN not in job.id,
    )
    with experiment:
        yield experiment


def _state(experiment: Any) -> dict[str, Any]:
    with _quietly():
        (found,) = experiment.status(return_dict=True).values()
    return dict(found) | {"status": getattr(found["status"], "name", str(found["status"]))}


def _nemo_run() -> Any:
    """The module. Its import warns of a dozen other packages and takes some seconds."""
    os.environ.setdefault("NEMORUN_HOME", str(nemo_run_home()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import nemo_run
        except ImportError as error:
            raise UserError(f"nemo-run does not import ({error}): pip install --no-deps -r {lock_file('launch')}") from None

    return nemo_run


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what nemo-run and torchx log of every step, and without the terminal's input, which their commands would read."""
    logging.disable(logging.WARNING)
    terminal = sys.stdin
    with open(os.devnull) as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = terminal
            logging.disable(logging.NOTSET)
