"""Cases for several ranks: a mixture of experts over the layouts of one world size: pushes, updates, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_nsr.models.backends import choose_backend
from megatron_nsr.models.hf_config import read_model_shape
from megatron_nsr.platform import distributed
from megatron_nsr.training.setup import build_actor
from megatron_nsr.weights.checksums import policy_checksums
from megatron_nsr.weights.gathering import execute_push_plan, plan_for
from megatron_nsr.weights.safetensors_files import SafetensorsDirectory
from tests.checksums import whole_checksums
from tests.distributed.training_cases import config_of, resume, run_layout

LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "one": {},
        "one_recompute": {"recompute": "full"},
        "one_small_micro_batches": {"tokens_per_micro_batch": 24},
        "one_without_aux_loss": {"router_aux_loss": 0.0},
    },
    2: {
        "dp2": {},
        "ep2": {"expert": 2},
        "ep2_small_micro_batches": {"expert": 2, "tokens_per_micro_batch": 24},
        "ep2_recompute_distributed_optimizer": {"expert": 2, "recompute": "full", "distributed_optimizer": True},
        "cp2": {"context": 2},
        "tp2_sp": {"tensor": 2, "sequence": True},
        "tp2_sp_ep2": {"tensor": 2, "sequence": True, "expert": 2},
        "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    },
    4: {
        "dp4_ep2_distributed_optimizer": {"expert": 2, "distributed_optimizer": True},
        "pp2_ep2": {"pipeline": 2, "expert": 2},
        "pp2_vpp2_ep2": {"pipeline": 2, "virtual_pipeline": 2, "expert": 2},
        "tp2_sp_dp2_ep4": {"tensor": 2, "sequence": True, "expert": 4},
        "tp2_sp_dp2_ep2_distributed_optimizer": {"tensor": 2, "sequence": True, "expert": 2, "distributed_optimizer": True},
        "tp2_sp_pp2_ep2": {"tensor": 2, "sequence": True, "pipeline": 2, "expert": 2},
        "tp2_sp_cp2_ep4": {"tensor": 2, "sequence": True, "context": 2, "expert": 4},
        "cp2_dp2_ep2_recompute_distributed_optimizer": {"context": 2, "expert": 2, "recompute": "full", "distributed_optimizer": True},
    },
}
FIELDS = {layout: {"router_aux_loss": 0.01} | fields for layouts in LAYOUTS.values() for layout, fields in layouts.items()}
# (layout that wrote a checkpoint, layout that continues it), by world size. The worlds run in the order 4, 1, 2.
MOVES: dict[int, list[tuple[str, str]]] = {
    4: [("tp2_sp_dp2_ep2_distributed_optimizer", "pp2_vpp2_ep2"), ("pp2_ep2", "dp4_ep2_distributed_optimizer")],
    1: [("dp4_ep2_distributed_optimizer", "one"), ("tp2_sp_dp2_ep4", "one")],
    2: [("one", "ep2"), ("one", "ep2_recompute_distributed_optimizer"), ("tp2_sp_pp2_ep2", "tp2_sp"), ("pp2_vpp2_ep2", "tp2_sp_ep2")],
}


def push(model: Path, layout: str) -> dict[str, bool]:
    """Whether a push hands out what was loaded, bit for bit, and the checksums of the shards are those of the whole tensors."""
    shape = read_model_shape(str(model))
    actor = build_actor(config_of(model, dict(FIELDS[layout])), shape, choose_backend("cpu"), training=False)
    plan = plan_for(actor.chunks, shape, 1 << 15)
    pushed = dict(execute_push_plan(plan, actor.chunks))
    with SafetensorsDirectory(str(model)) as files:
        equal = pushed.keys() == files.keys() and all(torch.equal(pushed[name], files[name]) for name in files)
        sums = policy_checksums(plan, actor.chunks, torch.float32)
        same_sums = sums == whole_checksums(((name, files[name]) for name in files), torch.float32)
    return {name: all(distributed.all_gather_object(value)) for name, value in (("equal", equal), ("same_sums", same_sums))}


def find(model: Path, out: Path) -> dict[str, Any]:
    world = distributed.world_size()
    found: dict[str, Any] = {}
    for layout in LAYOUTS[world]:
        found[layout] = run_layout(model, FIELDS[layout], out / layout) | {"push": push(model, layout)}
    for source, layout in MOVES[world]:
        found[f"{source}-{layout}"] = resume(
            model, FIELDS[layout], out / source / "checkpoints", out / layout / f"from_{source}.pt"
        )  # fmt: skip
    return found
