"""What a job would die of once it has queued, found when it is launched: too few ranks for the layout, too few GPUs for the servers.

May import: this package, config, models, rollout, types.
"""

from __future__ import annotations

from pathlib import Path

from megatron_nsr.config import Config
from megatron_nsr.launch.cluster import Cluster
from megatron_nsr.launch.mounts import path_here
from megatron_nsr.models.hf_config import ModelShape, read_model_shape
from megatron_nsr.models.parallel import validate_layout, validate_ranks
from megatron_nsr.rollout.vllm_engine import check_tensor_parallel
from megatron_nsr.types import UserError


def check_fits(config: Config, cluster: Cluster, cwd: Path) -> None:
    """The checks of `train` on the ranks that there will be, and on the model where its config.json can be read from here.

    Raises UserError naming the field, its value and what would be right.
    """
    shape, ranks = _shape(config, cluster, cwd), cluster.nodes * cluster.ranks_per_node
    try:
        if shape is None:
            validate_ranks(config.parallel, ranks)
        else:
            validate_layout(config.parallel, shape, ranks)
        if config.rollout.mode == "colocated":
            check_tensor_parallel(config.rollout.tensor_parallel, world_size=ranks, attention_heads=shape.heads if shape else None)
    except UserError as error:
        raise UserError(f"{error} (ranks: cluster.nodes={cluster.nodes} x {cluster.ranks_per_node} a node)") from None
    if cluster.rollout:
        _check_servers(config, cluster, cluster.rollout.servers_per_node, shape)


def _check_servers(config: Config, cluster: Cluster, servers: int, shape: ModelShape | None) -> None:
    workers, gpus = config.rollout.tensor_parallel, cluster.gpus_per_node
    if gpus and servers * workers > gpus:
        asked = f"cluster.rollout.servers_per_node={servers} x rollout.tensor_parallel={workers}"
        raise UserError(f"{asked}: more than cluster.gpus_per_node={gpus}; lower one of them")
    check_tensor_parallel(workers, world_size=workers, attention_heads=shape.heads if shape else None)


def _shape(config: Config, cluster: Cluster, cwd: Path) -> ModelShape | None:
    """None where the model is not on this machine, as it may be on the job's."""
    path = path_here(config.model.path, cluster, cwd)
    return read_model_shape(str(path)) if path and (path / "config.json").is_file() else None
