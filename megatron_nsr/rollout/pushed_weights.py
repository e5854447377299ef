"""Checks a stream of pushed weights against the names that an engine's model needs.

May import: torch and the standard library.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def checkpoint_names(parameters: Iterable[str], packed: Mapping[str, Sequence[str]]) -> frozenset[str]:
    """The HF names behind an engine's parameters: `qkv_proj.weight` with packed {"qkv_proj": [q, k, v]} stands for three tensors."""
    names: set[str] = set()
    for parameter in parameters:
        parts = parameter.split(".")
        fused = next((i for i, part in enumerate(parts) if part in packed), None)
        if fused is None:
            names.add(parameter)
        else:
            names.update(".".join([*parts[:fused], part, *parts[fused + 1 :]]) for part in packed[parts[fused]])
    return frozenset(names)


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
