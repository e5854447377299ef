"""What a job's container, or a machine of a cloud, sees of the paths in a config.

May import: this package, config, types.
"""

from __future__ import annotations

import os
from pathlib import Path

from megatron_nsr.config import Config
from megatron_nsr.launch.cluster import Cluster
from megatron_nsr.types import UserError


def split_mount(mount: str, cwd: Path) -> tuple[Path, Path]:
    """(SOURCE, PATH) of SOURCE:PATH, or of PATH alone; a relative SOURCE is below `cwd`, from where it is launched.

    Raises UserError where PATH, which the container sees, is not absolute.
    """
    written, colon, target = mount.rpartition(":")
    source = Path(os.path.abspath(cwd / Path(written if colon else target).expanduser()))
    if colon and not target.startswith("/"):
        raise UserError(f"cluster.mounts: {mount}: write SOURCE:PATH with an absolute PATH and nothing behind it")
    return source, Path(target) if colon else source


def split_bucket(mount: str) -> tuple[str, Path]:
    """(URL, PATH) of what SkyPilot mounts, as s3://name:/path. Raises UserError where it is something else."""
    bucket, _, path = mount.rpartition(":")
    if "://" not in bucket or not path.startswith("/"):
        raise UserError(f"cluster.mounts: {mount} is no bucket and path; with executor=skypilot write s3://name:/path")
    return bucket, Path(path)


def path_here(path: str, cluster: Cluster, cwd: Path) -> Path | None:
    """Where this machine has what the job finds at `path`; None where it lies in a cloud."""
    if cluster.executor == "skypilot":
        return None
    there = cwd / path
    for source, target in (split_mount(mount, cwd) for mount in cluster.mounts):
        if there.is_relative_to(target):
            return source / there.relative_to(target)
    return there


def check_mounted(config: Config, cluster: Cluster, cwd: Path) -> None:
    """A path that the container does not see is found here, and not by a job that has queued for a day. Raises UserError naming it."""
    targets = [cwd, *(split_mount(mount, cwd)[1] for mount in cluster.mounts)]
    for field, path in _paths(config).items():
        if not any((cwd / path).is_relative_to(target) for target in targets):
            raise UserError(f"{field}={path}: the container does not see it; add its directory to cluster.mounts")


def check_in_buckets(config: Config, cluster: Cluster) -> None:
    """Raises UserError where a mount is no bucket, or a path lies in none: SkyPilot's machines start empty and go with the job."""
    targets = [split_bucket(mount)[1] for mount in cluster.mounts]
    for field, path in _paths(config).items():
        if not any(Path(path).is_relative_to(target) for target in targets):
            raise UserError(f"{field}={path}: lies in none of cluster.mounts, and its machines go with the job; mount a bucket there")


def _paths(config: Config) -> dict[str, str]:
    """Everything that a run reads or writes outside its code, by the field that names it."""
    fields = {"run.dir": config.run.dir, "model.path": config.model.path, "data.train": config.data.train}
    fields |= {"data.validation": config.data.validation if isinstance(config.data.validation, str) else None}
    fields |= {f"evaluation.benchmarks.{name}": path for name, path in config.evaluation.benchmarks.items()}
    return {field: path for field, path in fields.items() if path is not None}
