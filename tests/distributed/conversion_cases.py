"""Cases for several ranks: imported checkpoints against what megatron-core saves of a real model, and training from them."""

from __future__ import annotations

import pickle
from itertools import product
from pathlib import Path
from typing import Any

import torch

from megatron_nsr.config import ParallelConfig
from megatron_nsr.conversion.importing import import_hf
from megatron_nsr.models.backends import choose_backend
from megatron_nsr.models.hf_config import read_model_shape
from megatron_nsr.platform import distributed
from megatron_nsr.training.actor import Actor
from megatron_nsr.training.checkpoints import Checkpoints
from megatron_nsr.training.setup import build_actor
from megatron_nsr.weights.checkpoint_pieces import OPTIMIZER_PREFIX
from megatron_nsr.weights.gathering import gather_hf_tensors
from megatron_nsr.weights.torch_dist_files import TorchDistReader
from tests.distributed.training_cases import config_of, train

LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {"dp2": {}, "tp2": {"tensor": 2}, "pp2": {"pipeline": 2}, "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2}},
    4: {"tp2_pp2": {"tensor": 2, "pipeline": 2}},
}
WITH_EXPERTS = {
    2: {"ep2": {"expert": 2}, "tp2_sp_ep2": {"tensor": 2, "sequence": True, "expert": 2}},
    4: {"ep2_pp2": {"expert": 2, "pipeline": 2}},
}
# Every layout trains from a checkpoint that was imported at another.
IMPORTED_AT = ParallelConfig(tensor=2, pipeline=2)
ELSEWHERE = ParallelConfig(pipeline=2, virtual_pipeline=2)


def layouts_of(model: str) -> dict[int, dict[str, dict[str, Any]]]:
    return WITH_EXPERTS if "moe" in model else LAYOUTS


def index_of(state: Path) -> dict[str, tuple[Any, ...]]:
    """Of each weight its dimensions, its dtype, and the place and size of its pieces."""
    metadata = pickle.loads((state / ".metadata").read_bytes())
    return {
        key: (tuple(tensor.size), str(tensor.properties.dtype), sorted((tuple(c.offsets), tuple(c.sizes)) for c in tensor.chunks))
        for key, tensor in metadata.state_dict_metadata.items()
        if not key.startswith(OPTIMIZER_PREFIX)
    }


def same_values(one: Path, other: Path) -> bool:
    a, b = TorchDistReader(one), TorchDistReader(other)

    def equal(key: str, sizes: tuple[int, ...]) -> bool:
        depth = 2 if ".experts." in key else 1 if key.startswith("decoder.layers.") else 0
        return all(torch.equal(a.read(key, index), b.read(key, index)) for index in product(*map(range, sizes[:depth])))

    return all(equal(key, sizes) for key, (sizes, *_) in index_of(one).items())


def weights_of(actor: Actor, shape: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in gather_hf_tensors(actor.chunks, shape, 1 << 16)}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def check(model: Path, name: str, fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One layout: what it saves of the HF model against the import at that layout; a step from HF against one from imports elsewhere."""
    shape, backend, layout = read_model_shape(str(model)), choose_backend("cpu"), ParallelConfig(**fields)
    config = config_of(model, dict(fields))
    actor = build_actor(config, shape, backend)
    saved, imported = folder / name / "saved", folder / name / "imported"
    checkpoints = Checkpoints(saved, keep=2)
    checkpoints.save(0, {}, actor.wrapped, actor.optimizer, backend, model)
    import_hf(model, imported, layout)
    source = IMPORTED_AT if layout != IMPORTED_AT else ELSEWHERE
    import_hf(model, folder / name / "elsewhere", source)
    found: dict[str, Any] = {}
    if distributed.rank() == 0:
        mine, theirs = imported / "state", saved / "step_0" / "state"
        found = {"same_index": index_of(mine) == index_of(theirs), "same_values": same_values(mine, theirs)}
    before = weights_of(actor, shape)
    metrics = train(actor, config, shape.vocab_size, 1)
    after = weights_of(actor, shape)
    checkpoints.save(1, {}, actor.wrapped, actor.optimizer, backend, model)
    del actor

    config = config_of(folder / name / "elsewhere", dict(fields))
    actor = build_actor(config, shape, backend)
    found["loaded_equal"] = equal(before, weights_of(actor, shape))
    found["step_equal"] = metrics == train(actor, config, shape.vocab_size, 1) and equal(after, weights_of(actor, shape))
    found["trained"] = not equal(before, after)
    if distributed.rank() == 0:
        torch.save(after, folder / name / "after.pt")
    return found


def reload(folder: Path, trained_at: str, fields: dict[str, Any]) -> bool:
    """Whether a checkpoint trained at another layout, read as `model.path`, holds what was trained."""
    path = folder / trained_at / "saved" / "step_1"
    shape = read_model_shape(str(path))
    actor = build_actor(config_of(path, dict(fields)), shape, choose_backend("cpu"), training=False)
    return equal(torch.load(folder / trained_at / "after.pt"), weights_of(actor, shape))


def find(models: Path, out: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for model in sorted(models.iterdir()):
        layouts, folder = layouts_of(model.name)[distributed.world_size()], out / model.name
        for name, fields in layouts.items():
            results[f"{name}/{model.name}"] = check(model, name, fields, folder)
        distributed.barrier()  # every rank must find the same files
        for name, fields in layouts.items():
            trained = (other for world in layouts_of(model.name).values() for other in world if other != name)
            others = [other for other in trained if (folder / other / "after.pt").is_file()]
            results[f"{name}/{model.name}"]["reloaded"] = {other: reload(folder, other, fields) for other in others}
    return results
