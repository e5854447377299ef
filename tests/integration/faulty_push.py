"""`python -m tests.integration.faulty_push ARGUMENTS`: the command, with one bucket spoiled between its gathering and its loading."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron_nsr import components
from megatron_nsr.cli import main

Tensors = Iterator[tuple[str, torch.Tensor]]
EXECUTE = components.execute_push_plan


def spoiled(*arguments: Any) -> Tensors:
    for name, tensor in EXECUTE(*arguments):
        yield name, tensor * 1.01 if name == "model.norm.weight" else tensor


if __name__ == "__main__":
    components.execute_push_plan = spoiled
    main()
