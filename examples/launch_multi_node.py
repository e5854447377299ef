"""Several runs as jobs of several nodes: one config, one cluster, three objectives. Copy it and change both.

    python examples/launch_multi_node.py --dry-run                 prints what would be submitted
    python examples/launch_multi_node.py --cluster my_cluster.yaml

Each job queues again when it is preempted or at its time limit, and goes on; `megatron-nsr job status JOB` says where it is.
Starting this program again goes on with runs that were stopped, and adds nothing to those that are done.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_nsr.launch.command import launch
from megatron_nsr.types import UserError

CONFIGS = Path(__file__).parents[1] / "configs"
OBJECTIVES = ("psr", "nsr", "w_reinforce")


def main() -> int:
    """Submits a job for each objective; exit status 2 where the input is wrong."""
    parser = argparse.ArgumentParser(description="Submit one job an objective.")
    parser.add_argument("--config", type=Path, default=CONFIGS / "quickstart.yaml")
    parser.add_argument("--cluster", type=Path, default=CONFIGS / "clusters" / "slurm.yaml", help="where the jobs run")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--dry-run", action="store_true")
    chosen = parser.parse_args()
    for objective in OBJECTIVES:
        try:
            launch(
                chosen.config,
                [f"objective.name={objective}", f"cluster.nodes={chosen.nodes}"],
                cluster_file=chosen.cluster,
                executor=None,
                dry_run=chosen.dry_run,
                detach=not chosen.dry_run,  # the jobs run side by side
                follow=False,
                uncommitted=False,
            )
        except UserError as error:
            print(f"launch_multi_node: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
