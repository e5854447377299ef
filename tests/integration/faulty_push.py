"""`python -m tests.integration.faulty_push ARGUMENTS`: the command, with an engine that is given slightly wrong weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_nsr.cli import main
from megatron_nsr.rollout.rollouts import Rollouts

Tensors = Iterator[tuple[str, torch.Tensor]]


def spoiled(tensors: Tensors) -> Tensors:
    for name, tensor in tensors:
        yield name, tensor * 1.01 if name == "model.norm.weight" else tensor


def install() -> None:
    push = Rollouts.push

    def push_spoiled(self: Rollouts, tensors: Tensors, version: int) -> None:
        push(self, spoiled(tensors), version)

    Rollouts.push = push_spoiled  # type: ignore[method-assign]


if __name__ == "__main__":
    install()
    main()
