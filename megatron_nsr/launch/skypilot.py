"""A job as SkyPilot's task file. May import: this package, yaml.

The scripts then see the paths of SkyPilot's machines: the job's directory is copied to /tmp there, and its commit is where the ranks start.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from megatron_nsr.launch.job import Job, JobDirectory
from megatron_nsr.launch.mounts import split_bucket

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
        bucket, path = split_bucket(mount)
        mounts[str(path)] = {"source": bucket, "mode": "MOUNT"}
    values = {
        "name": job.title,
        "num_nodes": cluster.nodes,
        "resources": resources,
        "file_mounts": mounts,
        "run": f"bash {there.directory.path / 'train.sh'}\n",
    }
    return yaml.safe_dump(values, sort_keys=False)
