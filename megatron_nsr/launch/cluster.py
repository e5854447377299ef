"""The description of where a job runs: one strict section of its own, so that a training config is the same everywhere.

May import: config, config_files, types.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from megatron_nsr.config_files import describe_errors, read_values
from megatron_nsr.config_sections import NonNegative, Positive, Section
from megatron_nsr.types import UserError

PREFIX = "cluster."
SUBMITTED_BY = {
    "slurm": ("sbatch", "launch from a login node of the cluster"),
    "docker": ("docker", "install Docker, or take executor=local"),
    "skypilot": ("sky", "pip install skypilot, in an environment of its own, and put its sky on PATH"),
}
NAMES_ALONE = "cluster.secrets: give names alone, as [WANDB_API_KEY]; values come from the shell that launches"
NAME = "^[A-Za-z_][A-Za-z0-9_]*$"


def _plain(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("give a string or a number; what YAML reads as something else goes in quotes")
    return value


def _option(value: Any) -> Any:
    if value is not True and (isinstance(value, bool) or not isinstance(value, str | int)):
        raise ValueError("give a string, a whole number, or true for the bare option")
    return value


Name = Annotated[str, Field(pattern=NAME)]
Value = Annotated[str | int | float, BeforeValidator(_plain)]
Option = Annotated[str | int | Literal[True], BeforeValidator(_option)]


class RolloutServers(Section):
    nodes: Positive = Field(description="nodes that only sample, beside those that train")
    servers_per_node: Positive = Field(1, description="servers a node; each takes rollout.tensor_parallel of its GPUs")


# sbatch: MINUTES[:SECONDS], HOURS:MINUTES:SECONDS or DAYS-HOURS[:MINUTES[:SECONDS]]
TIME = re.compile(r"(?P<m>\d+)(:(?P<s>\d+))?|(?P<H>\d+):(?P<M>\d+):(?P<S>\d+)|(?P<d>\d+)-(?P<h>\d+)(:(?P<n>\d+)(:(?P<t>\d+))?)?")
SECONDS = {"d": 86400, "h": 3600, "H": 3600, "m": 60, "M": 60, "n": 60, "s": 1, "S": 1, "t": 1}
UNLIMITED = ("UNLIMITED", "INFINITE")
# What the job's script sets itself, and the key that says it.
OWN_OPTIONS = {
    **{name: f"slurm.{name}" for name in ("account", "partition", "qos", "time")},
    **{"nodes": "nodes", "gpus-per-node": "gpus_per_node", "ntasks-per-node": "processes_per_node", "ntasks": "processes_per_node"},
    **{"signal": "slurm.grace_s", "job-name": "run.dir", "output": "run.dir", "open-mode": "run.dir"},
}


def _seconds(time: str) -> float:
    """Of a time as sbatch reads it. Raises ValueError where it does not."""
    if time in UNLIMITED:
        return float("inf")
    found = TIME.fullmatch(time)
    if found is None:
        raise ValueError("give it as sbatch takes it: minutes, hours:minutes:seconds or days-hours:minutes:seconds")
    return sum(SECONDS[name] * int(number) for name, number in found.groupdict().items() if number)


class SlurmSettings(Section):
    account: str | None = Field(None, description="sbatch --account")
    partition: str | None = Field(None, description="sbatch --partition")
    qos: str | None = Field(None, description="sbatch --qos")
    time: str = Field("04:00:00", description="sbatch --time; a job that has not finished by then queues again and goes on")
    grace_s: NonNegative = Field(600, description="how long before that the trainer is told to write its checkpoint, seconds")
    options: dict[str, Option] = Field(
        default_factory=dict, description="further options of sbatch by their long names, as reservation: NAME; true gives the bare option"
    )

    @field_validator("time", mode="before")
    @classmethod
    def _a_time(cls, time: Any) -> Any:
        if not isinstance(time, str):
            raise ValueError('write it in quotes, as "12:00:00": YAML takes some times for numbers')
        _seconds(time)
        return time

    @field_validator("options")
    @classmethod
    def _ours_left_alone(cls, options: dict[str, Any]) -> dict[str, Any]:
        names = [key.replace("_", "-").lstrip("-") for key in options]
        for key, name in zip(options, names, strict=True):
            if name in OWN_OPTIONS:
                raise ValueError(f"{key} is set by {OWN_OPTIONS[name]}; leave it out")
            if len(name) == 1 or key.startswith("-"):
                raise ValueError(f"{key}: give an option's long name, without dashes in front")
            if names.count(name) > 1:
                raise ValueError(f"{name} stands there twice, as {' and '.join(key for key in options if key.replace('_', '-') == name)}")
        return options


class SkypilotSettings(Section):
    infra: str | None = Field(None, description="where SkyPilot looks for machines: aws, gcp, k8s, k8s/CONTEXT, ...; null: wherever it may")
    gpu: str | None = Field(None, description="SkyPilot's name of the GPU, as H200; gpus_per_node of them a node")
    spot: bool = Field(False, description="interruptible machines")


class Cluster(Section):
    """Where a job runs."""

    executor: Literal["local", "docker", "slurm", "skypilot"] = Field("local", description="what starts the job")
    nodes: Positive = Field(1, description="nodes that train")
    gpus_per_node: Positive | None = Field(None, description="GPUs to ask for on each node; null asks for none")
    processes_per_node: Positive | None = Field(None, description="ranks a node; null is one a GPU, or one where gpus_per_node is null")
    image: str | None = Field(
        None, description="container image: of a registry, or for slurm a .sqsh file too; null (local, slurm, skypilot) runs without one"
    )
    mounts: list[str] = Field(
        default_factory=list,
        description="further paths for the container, SOURCE:PATH, or PATH alone where both are the same; the working directory is always "
        "there. With skypilot a SOURCE is a bucket, as s3://name",
    )
    python: str | None = Field(
        None,
        description="the job's Python, by a name on its PATH or a path; null: launch's own, or python in an image or a cloud",
    )
    environment: dict[Name, Value] = Field(default_factory=dict, description="environment variables of the job, for everybody to see")
    secrets: list[Name] = Field(
        default_factory=list,
        description="names of environment variables that the job gets with the values that they have where `launch` runs; values are never "
        "written or shown",
    )
    setup: list[str] = Field(default_factory=list, description="shell lines before Python starts, as module load cuda")
    rollout: RolloutServers | None = Field(None, description="nodes with rollout servers of the job's own; sets rollout.mode=server")
    slurm: SlurmSettings = SlurmSettings()
    skypilot: SkypilotSettings = SkypilotSettings()

    @property
    def interpreter(self) -> str:
        return self.python or ("python" if self.image or self.executor == "skypilot" else sys.executable)

    @property
    def ranks_per_node(self) -> int:
        return self.processes_per_node or self.gpus_per_node or 1

    @model_validator(mode="after")
    def _consistent(self) -> Cluster:
        if self.executor in ("local", "docker") and self.nodes > 1:
            raise ValueError(f"nodes={self.nodes}: executor={self.executor} has one; use slurm or skypilot")
        if self.rollout and self.executor != "slurm":
            raise ValueError(
                f"rollout: only executor=slurm starts rollout servers, and this is {self.executor}; see rollouts.md for others"
            )
        if self.executor == "docker" and not self.image:
            raise ValueError("image: required with executor=docker, but not given")
        if self.gpus_per_node and self.ranks_per_node > self.gpus_per_node:
            raise ValueError(
                f"processes_per_node={self.processes_per_node}: more than gpus_per_node={self.gpus_per_node}, and a rank takes a GPU"
            )
        if self.mounts and not self.image and self.executor != "skypilot":
            raise ValueError("mounts: nothing is mounted without a container; give an image, or leave them out")
        if self.executor == "slurm" and self.slurm.grace_s >= _seconds(self.slurm.time):
            raise ValueError(
                f"slurm.grace_s={self.slurm.grace_s} is not less than slurm.time={self.slurm.time}: the run would be told to stop when it "
                "starts, and queue again for ever"
            )
        if both := set(self.secrets) & set(self.environment):
            raise ValueError(f"secrets: {', '.join(sorted(both))} stands in environment too; leave it in one")
        return self


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the run's, the cluster's without their `cluster.`), each in the order given."""
    ours = [item.removeprefix(PREFIX) for item in overrides if item.startswith(PREFIX)]
    return [item for item in overrides if not item.startswith(PREFIX)], ours


def load_cluster(path: Path | None, executor: str | None, overrides: Sequence[str]) -> Cluster:
    """A cluster's YAML file (none: the defaults) with the executor and `key=value` overrides on top.

    Raises UserError naming the field, its value and what would be right.
    """
    chosen = [f"executor={executor}"] if executor else []
    try:
        read_values(None, [item for item in overrides if item.startswith("secrets")])
    except UserError:  # its message has a piece of what cannot be read
        raise UserError(NAMES_ALONE) from None
    values = read_values(path, [*chosen, *overrides])
    _check_secrets(values)
    try:
        return Cluster.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path or 'cluster'}: {describe_errors(error, Cluster)}") from None


def _check_secrets(values: Any) -> None:
    """Raises UserError where secrets are more than names. pydantic's message would show them."""
    secrets = values.get("secrets") if isinstance(values, dict) else None
    if secrets is None or (isinstance(secrets, list) and all(isinstance(name, str) and re.match(NAME, name) for name in secrets)):
        return
    raise UserError(NAMES_ALONE)


def unset_secrets(cluster: Cluster) -> str | None:
    """What is wrong where a secret has no value in this shell."""
    unset = [name for name in cluster.secrets if not os.environ.get(name)]
    return f"cluster.secrets: {', '.join(unset)} not set in this shell; export it, or leave it out of secrets" if unset else None


def check_here(cluster: Cluster) -> None:
    """Raises UserError where this shell lacks what submitting needs: the executor's program, or a value for a secret."""
    program, remedy = SUBMITTED_BY.get(cluster.executor, (None, ""))
    if program and shutil.which(program) is None:
        raise UserError(f"cluster.executor={cluster.executor}: there is no {program} here; {remedy}")
    if problem := unset_secrets(cluster):
        raise UserError(problem)
