"""The optimizer's state by the model's parameters: one form on disk for every kind of optimizer at every layout.

May import: platform, megatron-core. A parameter KEY of the model has, in its own shape and sharding and in fp32,

    optimizer.state.exp_avg.KEY, optimizer.state.exp_avg_sq.KEY     Adam's moments
    optimizer.state.fp32_param.KEY                                  its main weight, where the model's own weight is not fp32

and the number of updates stands in the common state. Rates, decay and the like are the configuration's and are not stored.

megatron-core 0.16.1 has forms of its own, which do not do:

- The distributed optimizer names things otherwise than the ordinary ones, and has main weights for fp32 models too.
- Its `fully_sharded_model_space` asks for a ShardedTensor.flattened_range, which dist_checkpointing/mapping.py (line 134) refuses.
- Its `fully_reshardable` saves wrong values where a buffer has several buckets: optimizer/distrib_optimizer.py joins the buckets without
  the padding between them (line 1118) and then cuts parameters out at offsets that count it (line 1501). Embeddings that are tied over
  pipeline stages have a bucket to themselves (distributed/param_and_grad_buffer.py, line 707).
- Reading it with torch's Adam fails on `step`, which is not among the tensors that were read (optimizer/distrib_optimizer.py, line 940).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from megatron_nsr.platform import distributed
from megatron_nsr.platform.host_memory import require_present

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN_WEIGHT = "fp32_param"


@dataclass(frozen=True, slots=True)
class Part:
    """What this rank's optimizer holds of a parameter: flat views of its tensors, which are elements `span` of the flat parameter."""

    span: slice
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter's place in a checkpoint, and who writes and reads its state there.

    group: the ranks that share its state out, None where each holds all of it. keeper: the rank within the group that writes and reads
    all of it; parameters are dealt out so that each rank's come to about as much as its share.
    """

    sharded: Any
    parameter: torch.Tensor  # `sharded` lets go of it when it is read (dist_checkpointing/strategies/torch.py, line 292)
    group: dist.ProcessGroup | None
    keeper: int

    @property
    def mine(self) -> bool:
        return self.group is None or self.keeper == dist.get_rank(self.group)

    def of(self, name: str, tensor: torch.Tensor | None) -> Any:
        """`tensor`, of the parameter's shape, at this place. The last of a replica id's (pipeline, tensor, data) is 0 for who writes."""
        changes: dict[str, Any] = {"key": f"optimizer.state.{name}.{self.sharded.key}", "data": tensor}
        if self.group is not None:
            changes["replica_id"] = (*self.sharded.replica_id[:2], 0)
        if isinstance(self.sharded, ShardedTensor):
            changes["dtype"] = torch.float32
        return replace(self.sharded, **changes)


class OptimizerState:
    """An optimizer's state for a checkpoint. Every rank calls `to_save`, or `to_load` and then `fill`.

    model_state: the model's sharded state dict under any keys, with the parameters themselves as data.
    """

    def __init__(self, optimizer: Any, model_state: Mapping[str, Any]) -> None:
        self._inner = list(getattr(optimizer, "chained_optimizers", [optimizer]))
        for inner in self._inner:
            _allocate(inner)
        self._parts = dict(item for inner in self._inner for item in _parts(inner))
        require_present((tensor for part in self._parts.values() for tensor in part.tensors.values()), "main weights and moments")
        self._places = _places([item for item in nested_values(model_state) if _is_parameter(item)], _sharing_groups(self._inner))
        whole = {place.parameter for place in self._places if place.group is None}
        if not whole <= self._parts.keys() <= {place.parameter for place in self._places}:
            raise RuntimeError("the parameters of the optimizer are not those of the model's sharded state")

    def to_save(self) -> dict[str, Any]:
        """The sharded state that goes to disk."""
        state: dict[str, Any] = {"step": max(distributed.all_gather_object(_updates(self._inner))), "tensors": {}}
        for index, place in enumerate(self._places):
            whole = {name: self._gathered(place, name) for name in _names(place.parameter)}
            if place.mine:
                state["tensors"][index] = {name: place.of(name, tensor) for name, tensor in whole.items()}
        return state

    def to_load(self) -> dict[str, Any]:
        """The sharded state to be read, with room for the tensors that this rank reads."""
        state: dict[str, Any] = {"tensors": {}}
        for index, place in enumerate(self._places):
            if place.mine:
                rooms = {name: self._room(place, name) for name in _names(place.parameter)}
                state["tensors"][index] = {name: place.of(name, room) for name, room in rooms.items()}
        return state

    @torch.no_grad()
    def fill(self, loaded: Mapping[str, Any]) -> None:
        """Takes over what was read. Raises RuntimeError where the main weights are not those of the model, which was loaded before."""
        for index, place in enumerate(self._places):
            part = self._parts.get(place.parameter)
            for name in _names(place.parameter):
                whole = _spread(place, loaded["tensors"][index][name].flatten() if place.mine else None)
                if part is not None:
                    part.tensors[name].copy_(whole[part.span])
        _set_updates(self._inner, int(loaded["step"]))
        self._check_main_weights()

    def _check_main_weights(self) -> None:
        equal = True
        for parameter, part in self._parts.items():
            if MAIN_WEIGHT in part.tensors:
                equal &= torch.equal(parameter.detach().view(-1)[part.span], part.tensors[MAIN_WEIGHT].to(parameter.dtype))
        if not all(distributed.all_gather_object(equal)):
            raise RuntimeError("the optimizer's main weights are not the model's")

    def _gathered(self, place: Place, name: str) -> torch.Tensor | None:
        """A parameter's whole tensor `name`, in its shape. With a group the keeper alone gets it, in host memory."""
        parameter, part = place.parameter, self._parts.get(place.parameter)
        if place.group is None:
            assert part is not None
            return part.tensors[name].view(parameter.shape)
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if part is not None:
            whole[part.span] = part.tensors[name]
        # Each element is zero on all ranks but one. Added as integers they keep every bit, the sign of zero included.
        dist.reduce(whole.view(torch.int32), group_dst=place.keeper, group=place.group)
        return whole.view(parameter.shape).cpu() if place.mine else None

    def _room(self, place: Place, name: str) -> torch.Tensor:
        """Where a tensor is read to: the optimizer's own where it holds all of it."""
        if place.group is None:
            return self._parts[place.parameter].tensors[name].view(place.parameter.shape)
        return torch.zeros(place.parameter.shape, dtype=torch.float32)


def _spread(place: Place, whole: torch.Tensor | None) -> torch.Tensor:
    """The flat tensor that the keeper read, on every rank of the group."""
    if place.group is None:
        assert whole is not None
        return whole
    received = torch.empty(place.parameter.numel(), dtype=torch.float32, device=place.parameter.device)
    if whole is not None:
        received.copy_(whole)
    dist.broadcast(received, group_src=place.keeper, group=place.group)
    return received


def _places(sharded: Sequence[Any], groups: Mapping[torch.Tensor, dist.ProcessGroup]) -> list[Place]:
    """The same keepers on all ranks of a group: these hold parameters of the same sizes in the same order."""
    kept: dict[dist.ProcessGroup, list[int]] = {}
    places = []
    for item in sharded:
        group, keeper = groups.get(item.data), 0
        if group is not None:
            elements = kept.setdefault(group, [0] * dist.get_world_size(group))
            keeper = elements.index(min(elements))
            elements[keeper] += item.data.numel()
        places.append(Place(item, item.data, group, keeper))
    return places


def _sharing_groups(optimizers: Sequence[Any]) -> dict[torch.Tensor, dist.ProcessGroup]:
    """By parameter, where the distributed optimizer shares out its state: the data-parallel ranks, for an expert those that have it."""
    buffers = [buffer for inner in optimizers if isinstance(inner, DistributedOptimizer) for buffer in inner.buffers]
    return {parameter: buffer.data_parallel_group for buffer in buffers for parameter in buffer.params}


def _is_parameter(item: Any) -> bool:
    return isinstance(item, (ShardedTensor, ShardedTensorFactory)) and isinstance(item.data, torch.nn.Parameter)


def _names(parameter: torch.Tensor) -> tuple[str, ...]:
    return MOMENTS if parameter.dtype == torch.float32 else (*MOMENTS, MAIN_WEIGHT)


def _parts(inner: Any) -> Iterator[tuple[torch.Tensor, Part]]:
    """(parameter of the model, what this rank's optimizer holds of it)."""
    for parameter, main, start in _main_weights(inner):
        tensors = {name: inner.optimizer.state[main][name].view(-1) for name in MOMENTS}
        if MAIN_WEIGHT in _names(parameter):
            tensors[MAIN_WEIGHT] = main.detach().view(-1)
        yield parameter, Part(slice(start, start + main.numel()), tensors)


def _main_weights(inner: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """(parameter of the model, the tensor that Adam updates for it, where in the flat parameter that begins)."""
    if isinstance(inner, DistributedOptimizer):
        for parameter, (group, order) in inner.model_param_group_index_map.items():
            main = inner.optimizer.param_groups[group]["params"][order]
            yield parameter, main, inner._get_model_param_range_map(parameter)["param"].start
    elif isinstance(inner, Float16OptimizerWithFloat16Params):
        for parameters, mains in zip(inner.float16_groups, inner.fp32_from_float16_groups, strict=True):
            yield from ((parameter, main, 0) for parameter, main in zip(parameters, mains, strict=True))
        yield from ((parameter, parameter, 0) for group in inner.fp32_from_fp32_groups for parameter in group)
    else:
        yield from ((parameter, parameter, 0) for parameter in inner.get_parameters())


def _allocate(inner: Any) -> None:
    """Gives Adam the state that it would make at its first update."""
    inner.init_state_fn(inner.optimizer, inner.config)
    if _is_torch(inner):
        for state in inner.optimizer.state.values():
            state.setdefault("step", torch.tensor(0.0))


def _is_torch(inner: Any) -> bool:
    """Torch's Adam counts updates by parameter; Apex's and Transformer Engine's by group of parameters."""
    return isinstance(inner.optimizer, torch.optim.Adam)


def _updates(optimizers: Sequence[Any]) -> int:
    """Updates so far as far as this rank knows: its share may be empty."""
    counts = [0]
    for inner in optimizers:
        holders = inner.optimizer.state.values() if _is_torch(inner) else inner.optimizer.param_groups
        counts += [int(holder["step"]) for holder in holders if "step" in holder]
    return max(counts)


def _set_updates(optimizers: Sequence[Any], updates: int) -> None:
    for inner in optimizers:
        if _is_torch(inner):
            for state in inner.optimizer.state.values():
                state["step"] = torch.tensor(float(updates))
        else:
            for group in inner.optimizer.param_groups:
                group["step"] = updates
