"""Checks a stream of pushed weights against the names that an engine's model needs.

May import: torch and the standard library.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SCALE = "weight_scale"  # how names end of what an engine in FP8 makes from the weights

# what vLLM calls the experts' weights, all experts of a layer in one tensor
EXPERT_PARTS = {"w13_weight": ("gate_proj", "up_proj"), "w2_weight": ("down_proj",)}


def checkpoint_names(parameters: Mapping[str, torch.Tensor], packed: Mapping[str, Sequence[str]]) -> frozenset[str]:
    """The HF names behind an engine's parameters: `qkv_proj.weight` with packed {"qkv_proj": [q, k, v]} stands for three tensors.

    A tensor of experts, [experts, ...], stands for one or two of each of them.
    """
    names: set[str] = set()
    for parameter, tensor in parameters.items():
        parts = parameter.split(".")
        if parts[-1].endswith(SCALE):
            continue
        if parts[-1] in EXPERT_PARTS:
            names.update(name for expert in range(len(tensor)) for name in expert_names(parameter, expert))
            continue
        fused = next((i for i, part in enumerate(parts) if part in packed), None)
        if fused is None:
            names.add(parameter)
        else:
            names.update(".".join([*parts[:fused], part, *parts[fused + 1 :]]) for part in packed[parts[fused]])
    return frozenset(names)


def expert_names(parameter: str, expert: int) -> list[str]:
    """The HF names of one expert's part of vLLM's `...mlp.experts.routed_experts.w13_weight`."""
    module, _, last = parameter.rpartition(".")
    return [f"{module.removesuffix('.routed_experts')}.{expert}.{part}.weight" for part in EXPERT_PARTS[last]]


class PushedWeights:
    """Iterates over pushed tensors once, remembering their names.

    A tensor that the engine cannot take is consumed but not passed on: an exception in the middle of a reload would leave vLLM's
    layers half made, and every later push would fail. `copy_embedding` passes the embedding a second time as the head: for an
    engine whose head is a tensor of its own although the model ties the two. `bytes` counts what the engine took, an embedding
    once.
    """

    def __init__(
        self, tensors: Iterator[tuple[str, torch.Tensor]], expected: frozenset[str], *, vocabulary: int, copy_embedding: bool
    ) -> None:
        self.bytes = 0
        self._expected = expected
        self._vocabulary = vocabulary
        self._copy_embedding = copy_embedding
        self._seen: set[str] = set()
        self._refused: list[str] = []
        self._stream = self._pass_on(tensors)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._stream

    def _pass_on(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            if name not in self._expected:
                self._refused.append(f"{name} is no weight of the model")
                continue
            if name in (EMBEDDING, HEAD) and len(tensor) != self._vocabulary:
                self._refused.append(f"{name} has {len(tensor)} rows, not vocab_size={self._vocabulary}: push it without padding")
                continue
            self._seen.add(name)
            self.bytes += tensor.nbytes
            yield name, tensor
            if self._copy_embedding and name == EMBEDDING:
                self._seen.add(HEAD)
                yield HEAD, tensor

    def drain(self) -> None:
        """Consumes what the engine left, so that ranks that gather the tensors together stay in step."""
        for _ in self._stream:
            pass

    def check(self) -> None:
        """Raises RuntimeError unless exactly the expected tensors came."""
        if self._refused:
            raise RuntimeError(f"pushed weights hold tensors that the engine cannot take: {few(self._refused)}")
        missing = sorted(self._expected - self._seen)
        if missing:
            raise RuntimeError(f"pushed weights lack {len(missing)} of {len(self._expected)} tensors: {few(missing)}")


def few(items: Sequence[str], count: int = 5) -> str:
    """The first items, for an error message."""
    return ", ".join(items[:count]) + (", ..." if len(items) > count else "")
