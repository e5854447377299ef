"""The experts of a vLLM model: where they keep their weights, and how those are renewed on CPU.

May import: this package and torch; vLLM only in functions.

A layer's experts share two tensors, w13_weight [experts, 2 * intermediate, hidden] and w2_weight [experts, hidden, intermediate]. On
CPU vLLM pads the intermediate size and packs both for its kernel (vllm/model_executor/layers/fused_moe/experts/cpu_moe.py, 0.32.0).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_nsr.rollout.pushed_weights import EXPERT_PARTS, expert_names

DIGIT_BITS = 8  # of numbers that bfloat16 holds exactly


@dataclass(frozen=True, slots=True)
class ExpertPart:
    """Where an HF tensor of an expert lies in a tensor of experts: `rows` rows from `row` on, and the first `columns` columns.

    first_row, first_column: of the whole HF tensor, that this rank's part starts with.
    """

    expert: int
    row: int
    rows: int
    columns: int
    first_row: int
    first_column: int


def repack_at_next_reload(model: torch.nn.Module) -> None:
    """To be called before every reload on CPU, which would otherwise leave the new experts neither padded nor packed.

    vLLM packs them only when it makes their kernel and takes a kernel that exists for a sign that they are packed
    (fused_moe/unquantized_fused_moe_method.py, _setup_kernel, 0.32.0).
    """
    for module in model.modules():
        if hasattr(module, "w13_weight"):
            module.quant_method.moe_kernel = None


def expert_parts(module: torch.nn.Module, parameter: str, rank: int) -> Iterator[tuple[str, ExpertPart]]:
    """(HF name, where it is) for what tensor-parallel rank `rank` holds in `parameter`, the full name of one of the module's tensors."""
    name = parameter.rpartition(".")[2]
    config = module.moe_config
    mine = config.intermediate_size_per_partition_unpadded or config.intermediate_size_per_partition
    experts, height, width = getattr(module, name).shape
    step = height // len(EXPERT_PARTS[name])
    for expert in range(experts):
        for number, hf in enumerate(expert_names(parameter, expert)):
            if name == "w13_weight":
                yield hf, ExpertPart(expert, number * step, mine, width, rank * mine, 0)
            else:
                yield hf, ExpertPart(expert, 0, height, mine, 0, rank * mine)


def read_experts(module: torch.nn.Module, name: str) -> Tensor:
    """The experts' tensor as it was before it was packed, padding included."""
    value: Tensor = getattr(module, name)
    if value.device.type != "cpu":
        return value
    if getattr(module.quant_method, "moe_kernel", None) is None:
        raise RuntimeError("this version of vLLM packs experts where they cannot be read back: use 0.32, or rollout.verify_push=never")
    kernel = module.quant_method.moe_kernel.fused_experts
    if not hasattr(kernel, "isa") or kernel._use_zentorch:
        return value
    from vllm._custom_ops import cpu_prepack_moe_weight

    return unpacked(value, lambda tensor: cpu_prepack_moe_weight(tensor, kernel.isa))


def unpacked(packed: Tensor, pack: Callable[[Tensor], Tensor]) -> Tensor:
    """The tensor that `pack` made `packed` from, where all it does is to move elements within each expert, alike for all.

    Where it moved them is seen by packing the elements' own numbers, digit by digit. packed: [experts, rows, columns].
    """
    numbers = torch.arange(packed[0].numel()).view(1, *packed.shape[1:])
    origins = torch.zeros(packed[0].numel(), dtype=torch.int64)
    for shift in range(0, int(numbers.max()).bit_length(), DIGIT_BITS):
        digit = numbers >> shift & (1 << DIGIT_BITS) - 1
        origins += pack(digit.to(packed.dtype)).flatten().long() << shift
    original = torch.empty_like(packed)
    original.flatten(1)[:, origins] = packed.flatten(1)
    return original
