"""Program for torchrun: updates of a mixture of experts on recorded trajectories, over the layouts of one world size."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from megatron_nsr.models.backends import choose_backend
from megatron_nsr.models.hf_config import read_model_shape
from megatron_nsr.platform import distributed
from megatron_nsr.training.setup import build_actor
from megatron_nsr.weights.checksums import policy_checksums
from megatron_nsr.weights.gathering import execute_push_plan, plan_for
from tests.distributed.training_cases import config_of, train

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
        "ep2_distributed_optimizer": {"expert": 2, "distributed_optimizer": True},
        "ep2_recompute": {"expert": 2, "recompute": "full"},
        "tp2_sp": {"tensor": 2, "sequence": True},
        "tp2_sp_ep2": {"tensor": 2, "sequence": True, "expert": 2},
        "pp2": {"pipeline": 2},
        "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    },
    4: {
        "ep4": {"expert": 4},
        "dp4_ep2_distributed_optimizer": {"expert": 2, "distributed_optimizer": True},
        "pp2_ep2": {"pipeline": 2, "expert": 2},
        "pp2_vpp2_ep2": {"pipeline": 2, "virtual_pipeline": 2, "expert": 2},
        "tp2_sp_dp2_ep4": {"tensor": 2, "sequence": True, "expert": 4},
        "tp2_sp_dp2_ep2_distributed_optimizer": {"tensor": 2, "sequence": True, "expert": 2, "distributed_optimizer": True},
        "tp2_sp_pp2_ep2": {"tensor": 2, "sequence": True, "pipeline": 2, "expert": 2},
    },
}


def run_layout(model: Path, fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    config, shape, backend = config_of(model, {"router_aux_loss": 0.01} | fields), read_model_shape(str(model)), choose_backend("cpu")
    actor = build_actor(config, shape, backend)
    plan = plan_for(actor.chunks, shape, 1 << 16)
    loaded = {name: tensor.clone() for name, tensor in execute_push_plan(plan, actor.chunks)}
    metrics = [train(actor, config, shape.vocab_size, step) for step in (1, 2)]
    updated = {name: tensor.clone() for name, tensor in execute_push_plan(plan, actor.chunks)}
    sums = policy_checksums(plan, actor.chunks, torch.float32)
    if distributed.rank() == distributed.world_size() - 1:
        folder.mkdir(parents=True)
        torch.save((loaded, updated, sums), folder / "weights.pt")
    return {"metrics": metrics}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args()
    distributed.init_process_group()
    layouts = LAYOUTS[distributed.world_size()]
    found = {layout: run_layout(arguments.model, fields, arguments.out / layout) for layout, fields in layouts.items()}
    if distributed.rank() == 0:
        arguments.results.write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy()


if __name__ == "__main__":
    main()
