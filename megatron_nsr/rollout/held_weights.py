"""What a vLLM engine holds of each Hugging Face tensor, as checksums that can be compared with the policy's.

May import: weights, this package, torch and the standard library; vLLM only in functions.

A parameter is read from where sampling reads it. On CPU vLLM packs linear layers and a float32 LM head into forms of oneDNN or of its own
kernels, and drops the plain weight of a linear layer (vllm/model_executor/layers/utils.py, dispatch_cpu_unquantized_gemm, 0.32.0).
Such a layer is read back by sending the unit vectors through it: one factor of each product is 1 and the others are 0, so
the outputs are its weights, without rounding.

An engine in FP8 (rollout.quantization) holds a linear layer's weight rounded, [inputs, outputs], with one scale an output: it is read as
their product, in float32.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_nsr.rollout.engine import Region
from megatron_nsr.rollout.pushed_weights import EMBEDDING, EXPERT_PARTS, HEAD, SCALE
from megatron_nsr.rollout.vllm_experts import expert_parts, read_experts
from megatron_nsr.weights.checksums import checksum
from megatron_nsr.weights.fp8_rows import E4M3, dequantized

UNIT_VECTORS = 256  # sent through a layer at once


@dataclass(frozen=True, slots=True)
class HeldPart:
    """Where one rank of an engine keeps its part of an HF tensor.

    parameter: the engine's parameter, of which it is the `rows` rows from `row` on. first_row, first_column: of the whole HF
    tensor, that the part starts with. expert, columns: where the parameter holds several experts, which one, and how many columns.
    """

    parameter: str
    row: int
    rows: int
    first_row: int
    first_column: int
    expert: int | None = None
    columns: int | None = None

    def of(self, value: Tensor) -> Tensor:
        """The part of the parameter's values."""
        matrix = value if self.expert is None else value[self.expert, :, : self.columns]
        return matrix[self.row : self.row + self.rows]


def held_parts(model: torch.nn.Module, packed: Mapping[str, Sequence[str]]) -> dict[str, HeldPart]:
    """HF name: where this rank keeps it, for every parameter of a vLLM model.

    packed: as vLLM's packed_modules_mapping, {"qkv_proj": [q, k, v]}: the parts lie one after another along dimension 0.
    """
    from vllm.distributed import get_tensor_model_parallel_rank

    rank = get_tensor_model_parallel_rank()
    found: dict[str, HeldPart] = {}
    for module_name, module, name in _parameters(model):
        stem, _, last = module_name.rpartition(".")
        parameter = f"{module_name}.{name}"
        if name in EXPERT_PARTS:
            for hf, place in expert_parts(module, parameter, rank):
                found[hf] = HeldPart(parameter, place.row, place.rows, place.first_row, place.first_column, place.expert, place.columns)
        elif last in packed:
            row = 0
            for number, (part, rows) in enumerate(zip(packed[last], module.output_partition_sizes, strict=True)):
                replicas = getattr(module, "num_kv_head_replicas", 1) if number else 1  # neighbours hold the same keys and values
                found[f"{stem}.{part}.{name}"] = HeldPart(parameter, row, rows, rank // replicas * rows, 0)
                row += rows
        elif hasattr(module, "org_vocab_size"):  # the last ranks' shards end with padding
            held = getattr(module, name).shape[0]
            rows = max(0, min(held, module.org_vocab_size - rank * held))
            found[parameter] = HeldPart(parameter, 0, rows, rank * held, 0)
        elif hasattr(module, "input_size") and name == "weight":
            inputs, outputs = _linear_size(module)
            cut = inputs != module.input_size
            found[parameter] = HeldPart(parameter, 0, outputs, 0, rank * inputs if cut else 0)
        else:
            found[parameter] = HeldPart(parameter, 0, len(getattr(module, name)), 0, 0)
    return found


@torch.inference_mode()
def held_checksums(model: torch.nn.Module, parts: Mapping[str, HeldPart], dtype: torch.dtype) -> dict[Region, int]:
    """Checksums of what this rank computes with. A parameter that is gone has none."""
    by_parameter: dict[str, list[str]] = defaultdict(list)
    for name, part in parts.items():
        by_parameter[part.parameter].append(name)
    sums: dict[Region, Tensor] = {}
    for module_name, module, name in _parameters(model):
        value = _read(module, name)
        exact = torch.float32 if getattr(module, name).dtype == E4M3 else dtype
        for hf in by_parameter[f"{module_name}.{name}"]:
            part = parts[hf]
            rows = torch.arange(part.first_row, part.first_row + part.rows)
            sums[hf, part.first_row, part.first_column] = checksum(part.of(value), rows, part.first_column, exact)
    return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))


def wrong_tensors(policy: Mapping[str, int], ranks: Iterable[Mapping[Region, int]]) -> list[str]:
    """HF names that an engine does not hold as the policy does, or holds differently on two of its ranks; sorted.

    policy: checksums of whole tensors; ranks: `held_checksums` of each rank of the engine. A head that the policy does not have
    is tied: it must be the embedding.
    """
    held: dict[Region, int] = {}
    wrong: set[str] = set()
    for rank in ranks:
        wrong |= {region[0] for region, share in rank.items() if held.setdefault(region, share) != share}
    sums: dict[str, int] = defaultdict(int)
    for (name, _, _), share in held.items():
        sums[name] = (sums[name] + share) % 2**64
    expected = {name: whole % 2**64 for name, whole in policy.items()}
    if HEAD in sums and EMBEDDING in expected:
        expected.setdefault(HEAD, expected[EMBEDDING])
    return sorted(wrong | {name for name in expected.keys() | sums.keys() if expected.get(name) != sums.get(name)})


def _parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, str]]:
    """(module's name, module, parameter's name)."""
    for module_name, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            if not name.endswith(SCALE):
                yield module_name, module, name


def _linear_size(module: torch.nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of this rank's part of a linear layer; one that all ranks have whole, as a router, names no partition."""
    whole: Any = module
    return getattr(whole, "input_size_per_partition", whole.input_size), getattr(whole, "output_size_per_partition", whole.output_size)


def _read(module: torch.nn.Module, name: str) -> Tensor:
    """A parameter's values as the layer uses them, [outputs, inputs] for a matrix."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    if name in EXPERT_PARTS:
        return read_experts(module, name)
    if getattr(module, name).dtype == E4M3:
        return _dequantized(module)
    value: Tensor = getattr(module, name)
    # An embedding's packed copy is never used, nor that of a head in bfloat16, whose logits are float32 (vllm_options.config_overrides;
    # vllm/model_executor/layers/logits_processor.py, _apply_head).
    packed_head = isinstance(module, ParallelLMHead) and value.dtype == torch.float32
    plain = isinstance(module, VocabParallelEmbedding) and not packed_head
    if name != "weight" or plain or not hasattr(module, "cpu_linear"):
        return value
    inputs = _linear_size(module)[0] if hasattr(module, "input_size") else module.embedding_dim
    outputs = []
    for start in range(0, inputs, UNIT_VECTORS):
        places = torch.arange(start, min(start + UNIT_VECTORS, inputs))
        units = torch.zeros(len(places), inputs, dtype=module.weight.dtype)
        units[torch.arange(len(places)), places] = 1
        outputs.append(module.quant_method.apply(module, units))
    return torch.cat(outputs).t()


def _dequantized(module: torch.nn.Module) -> Tensor:
    """[outputs, inputs] float32."""
    whole: Any = module
    inputs, outputs = _linear_size(module)
    values, scale = whole.weight, whole.weight_scale
    if values.shape != (inputs, outputs) or scale.shape != (outputs, 1):
        raise RuntimeError("this version of vLLM packs quantized weights where they cannot be read back: set rollout.verify_push=never")
    return dequantized(values.t(), scale)
