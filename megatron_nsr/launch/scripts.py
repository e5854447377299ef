"""The shell scripts of a job: text in, text out, so that a dry run shows them as they will run.

May import: this package.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from megatron_nsr.launch.job import Job
from megatron_nsr.launch.mounts import split_mount

SHUTDOWN_S = 1800  # torchrun's time between a signal and killing the ranks: for the step they are in, and its checkpoint
FIRST_SERVER_PORT = 8000
STATUS_VARIABLE = "MEGATRON_NSR_EXIT_STATUS"  # read by megatron_nsr.cli


def slurm_rank(job: Job) -> str:
    """srun starts it once a rank, so that a signal reaches every rank, and ranks follow the order of nodes."""
    return _script(
        "One rank: srun starts as many as there are.",
        [
            *_of_a_rank(job),
            "export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS",
            *(_wait_for_servers(job) if job.cluster.rollout else []),
            "trap : TERM  # the rank answers the signal; this shell waits for it",
            f"{_python(job)} -m megatron_nsr train {_quote(job.directory.config)}{_servers_override(job)}",
            "status=$?",
            "# Stopped after a checkpoint is no failure: srun would kill the ranks that are still closing.",
            '[ "$status" = 3 ] && exit 0',
            'exit "$status"',
        ],
    )


def slurm_server(job: Job) -> str:
    """srun starts it once a server. It announces its address, and starts the server again where it ends before the run."""
    directory, workers = job.directory, job.config.rollout.tensor_parallel
    gpus = [
        f"first=$((SLURM_LOCALID * {workers}))",
        f"export CUDA_VISIBLE_DEVICES=$(seq -s, $first $((first + {workers - 1})))",
    ]
    return _script(
        "One rollout server: srun starts as many as there are.",
        [
            *_surroundings(job),
            *(gpus if job.cluster.gpus_per_node else []),
            f"port=$(({FIRST_SERVER_PORT} + SLURM_PROCID))",
            f"mkdir -p {_quote(directory.servers)}",
            f'echo "http://$(hostname):$port" > {_quote(directory.servers)}/$SLURM_PROCID',
            "trap : TERM  # the run may still need its servers to finish a step",
            f"until [ -e {_quote(directory.exit_status)} ]; do",
            f'    {_python(job)} -m megatron_nsr serve {_quote(directory.config)} --host 0.0.0.0 --port "$port"',
            '    echo "server $SLURM_PROCID ended with status $?"',
            "    sleep 2",
            "done",
        ],
    )


def slurm_batch_lines(job: Job) -> str:
    """Goes into nemo-run's batch script, after it has found the first node's address and before srun."""
    return "\n".join(
        [
            "",
            "# Where the ranks meet",
            "export MASTER_ADDR=${head_node_ip%% *} MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))",
            "set +vx",
            "unset SLURM_UNBUFFEREDIO  # it gives every rank a terminal, and the log its control characters",
            "# Since 22.05 srun does not take sbatch's --cpus-per-task; of a heterogeneous job both parts have the same",
            "cpus=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK_HET_GROUP_0}",
            '[ -z "$cpus" ] || export SRUN_CPUS_PER_TASK=$cpus',
            "",
            "# A run that was told to stop wrote a checkpoint, with status 3: the job queues again and goes on, unless it was cancelled",
            f"exit_status={_quote(job.directory.exit_status)}",
            f'rm -rf "$exit_status" {_quote(job.directory.servers)}',
            "cancelled=",
            "trap 'cancelled=1' TERM",
            """trap '[ -n "$cancelled" ] || [ "$(cat "$exit_status")" != 3 ] || scontrol requeue "$SLURM_JOB_ID"' EXIT""",
        ]
    )


def torchrun_node(job: Job) -> str:
    """One node's torchrun, on this machine or in a container on it."""
    return _script(
        "All ranks of this machine.",
        [*_of_a_rank(job), f"exec {_torchrun(job, ['--standalone'])} {_quote(job.directory.config)}"],
    )


def skypilot_node(job: Job) -> str:
    """One node's torchrun on SkyPilot's machines, where paths are those that SkyPilot mounts."""
    meeting = [
        '--nnodes "$SKYPILOT_NUM_NODES" --node-rank "$SKYPILOT_NODE_RANK"',
        '--master-addr "$(echo "$SKYPILOT_NODE_IPS" | head -n 1)" --master-port 29500',
    ]
    return _script(
        "All ranks of one of SkyPilot's machines.",
        [*_of_a_rank(job), f"exec {_torchrun(job, meeting)} {_quote(job.directory.config)}"],
    )


def local_start(job: Job) -> str:
    """What nemo-run's local executor runs: it notes the process that takes signals, and sends what is printed to the log."""
    return _script("The job on this machine.", [*_start_lines(job), f"exec bash {_quote(job.directory.path / 'train.sh')}"])


def docker_start(job: Job) -> str:
    """The same in a container. Secrets go by name: docker takes their values from the environment."""
    return _script("The job in a container on this machine.", [*_start_lines(job), f"exec {docker_command(job)}"])


def skypilot_start(job: Job) -> str:
    return _script("The job on machines that SkyPilot finds.", [*_start_lines(job), f"exec {skypilot_command(job)}"])


def docker_command(job: Job) -> str:
    """`docker run`, an option a line."""
    cluster = job.cluster
    options = [
        f'--rm --name {_quote(job.id)} --user "$(id -u):$(id -g)"',
        "--network host --ipc host --ulimit memlock=-1",
        f"--env HOME={_quote(job.directory.path)}",  # this user has none in the image, and caches need one
        *([f"--gpus {cluster.gpus_per_node}"] if cluster.gpus_per_node else []),
        *(f"--env {name}" for name in cluster.secrets),
        *(f"--volume {_quote(mount)}" for mount in container_mounts(job)),
        f"--workdir {_quote(job.cwd)}",
        "--entrypoint bash",
    ]
    return " \\\n    ".join(["docker run", *options, f"{_quote(cluster.image or '')} {_quote(job.directory.path / 'train.sh')}"])


def skypilot_command(job: Job) -> str:
    """`sky launch`; the machines go when the job has ended."""
    secrets = [f"--secret {name}" for name in job.cluster.secrets]
    task = _quote(job.directory.path / "task.yaml")
    return " \\\n    ".join(
        ["sky launch --yes --down --retry-until-up", f"--cluster {_quote(job.id.lower().replace('_', '-'))}", *secrets, task]
    )


def container_mounts(job: Job) -> list[str]:
    """SOURCE:PATH of everything that a container sees: the working directory, the job's directory and what the user adds."""
    mounts = [split_mount(mount, job.cwd) for mount in (str(job.cwd), str(job.directory.path), *job.cluster.mounts)]
    return list(dict.fromkeys(f"{source}:{target}" for source, target in mounts))


def _surroundings(job: Job) -> list[str]:
    """Directory, variables and the user's own lines. The commit goes before the working directory, from which only other files come."""
    code = [str(job.directory.code)] if job.source else []
    path = ":".join(dict.fromkeys([*code, str(job.cwd)]))
    return [
        f"cd {_quote(job.cwd)} || exit 1",
        f"export PYTHONPATH={_quote(path)}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}",
        *(f"export {name}={_quote(value)}" for name, value in job.cluster.environment.items()),
        *job.cluster.setup,
    ]


def _of_a_rank(job: Job) -> list[str]:
    return [*_surroundings(job), f"export {STATUS_VARIABLE}={_quote(job.directory.exit_status)}"]


def _start_lines(job: Job) -> list[str]:
    return [f"echo $$ > {_quote(job.directory.pid)}", f"exec >> {_quote(job.directory.log)} 2>&1"]


def _torchrun(job: Job, meeting: list[str]) -> str:
    options = [*meeting, f"--nproc-per-node {job.cluster.ranks_per_node} --shutdown-timeout {SHUTDOWN_S}", "-m megatron_nsr train"]
    return " \\\n    ".join([f"{_python(job)} -m torch.distributed.run", *options])


def _wait_for_servers(job: Job) -> list[str]:
    rollout, servers = job.cluster.rollout, _quote(job.directory.servers)
    assert rollout is not None
    return [
        f'until [ "$(ls {servers} 2>/dev/null | wc -l)" = {rollout.nodes * rollout.servers_per_node} ]; do sleep 1; done',
        f"servers=$(cat {servers}/* | paste -sd,)",
    ]


def _servers_override(job: Job) -> str:
    return ' "rollout.servers=[$servers]"' if job.cluster.rollout else ""


def _script(purpose: str, lines: list[str]) -> str:
    return "\n".join(["#!/usr/bin/env bash", f"# {purpose}", *lines, ""])


def _python(job: Job) -> str:
    return _quote(job.cluster.interpreter)


def _quote(value: str | int | float | Path) -> str:
    return shlex.quote(str(value))
