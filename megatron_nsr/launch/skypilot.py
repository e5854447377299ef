"""A job as SkyPilot's task file. May import: this package, yaml.

The scripts then see the paths of SkyPilot's machines: the job's directory is copied to /tmp there, and its commit is where the ranks start.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from megatron_nsr.launch.job import Job, JobDirectory
from megatron_nsr.types import UserError

REMOTE = Path("/tmp/megatron_nsr")


def on_its_machines(job: Job) -> Job:
    """The job with the paths that hold there."""
    directory = JobDirectory(REMOTE / job.id)
    return replace(job, directory=directory, cwd=directory.code)


def task(job: Job) -> str:
    """The YAML that `sky launch` reads."""
    cluster, there = job.cluster, on_its_machines(job)
    resources: dict[str, Any] = {
        **({"infra": cluster.skypilot.infra} if cluster.skypilot.infra else {}),
        **({"accelerators": f"{cluster.skypilot.gpu}:{cluster.gpus_per_node}"} if cluster.skypilot.gpu else {}),
        **({"image_id": f"docker:{cluster.image}"} if cluster.image else {}),
        **({"use_spot": True} if cluster.skypilot.spot else {}),
    }
    mounts: dict[str, Any] = {str(there.directory.path): str(job.directory.path)}
    for mount in cluster.mounts:
        bucket, _, path = mount.rpartition(":")
        mounts[path] = {"source": bucket, "mode": "MOUNT"}
    values = {
        "name": job.title,
        "num_nodes": cluster.nodes,
        "resources": resources,
        "file_mounts": mounts,
        "run": f"bash {there.directory.path / 'train.sh'}\n",
    }
    return yaml.safe_dump(values, sort_keys=False)


def check_mounted(job: Job) -> None:
    """Raises UserError where a mount is no bucket, or run.dir lies in none: SkyPilot's machines go when the job ends."""
    targets = []
    for mount in job.cluster.mounts:
        bucket, _, path = mount.rpartition(":")
        if "://" not in bucket or not path.startswith("/"):
            raise UserError(f"cluster.mounts: {mount} is no bucket and path; with executor=skypilot write s3://name:/path")
        targets.append(Path(path))
    run = Path(job.config.run.dir)
    if not any(run.is_relative_to(target) for target in targets):
        raise UserError(f"run.dir={run}: lies in none of cluster.mounts, and SkyPilot's machines go with the job; mount a bucket there")
