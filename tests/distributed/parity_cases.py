"""Cases for several ranks: logits against Hugging Face's and gathered weights, over the layouts of one world size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_nsr.config import ParallelConfig
from megatron_nsr.models.backends import Backend, choose_backend
from megatron_nsr.models.hf_config import ModelShape, read_model_shape
from megatron_nsr.models.parallel import initialize_parallel
from megatron_nsr.models.policy import Head, PolicyModel, build_policy
from megatron_nsr.platform import distributed
from megatron_nsr.weights import gathering
from megatron_nsr.weights.checksums import policy_checksums
from megatron_nsr.weights.fp8_rows import is_rounded, largest_of_rows, rounded_rows
from megatron_nsr.weights.gathering import execute_push_plan, gather_hf_tensors, plan_for
from megatron_nsr.weights.loading import load_hf_weights, random_hf_tensors
from megatron_nsr.weights.push_plan import PushPlan
from megatron_nsr.weights.safetensors_files import SafetensorsDirectory
from tests.checksums import whole_checksums

LAYOUTS = {
    2: {
        "tp2": {"tensor": 2},
        "tp2_sp": {"tensor": 2, "sequence": True},
        "pp2": {"pipeline": 2},
        "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
        "dp2": {},
    },
    4: {
        "tp2_pp2": {"tensor": 2, "pipeline": 2},
        "tp2_sp_pp2_vpp2": {"tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 2},
        "pp4": {"pipeline": 4},
    },
}
LENGTHS = ([5, 1, 12], [9, 9], [20, 3, 3], [2, 6])  # micro-batches of unequal length; each total is a multiple of 2


def gathered_logits(layout: ParallelConfig) -> Head:
    """A head that returns the logits [tokens, padded vocabulary], the same on every tensor-parallel rank."""
    from megatron.core import tensor_parallel

    def head(hidden: torch.Tensor, weight: torch.Tensor, _labels: Any) -> torch.Tensor:
        if layout.sequence:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
        return tensor_parallel.gather_from_tensor_model_parallel_region(hidden @ weight.T)

    return head


def tokens_of(lengths: Sequence[int], vocab_size: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(sum(lengths)))


def forward_backward(chunks: list[PolicyModel], backend: Backend, shape: ModelShape) -> list[torch.Tensor]:
    """Logits of each micro-batch on the last stage, [] elsewhere; gradients of the sum of their squares stay in .grad."""

    def forward_step(iterator: Any, chunk: PolicyModel) -> Any:
        lengths = next(iterator)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        packing = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths)
        )
        tokens = tokens_of(lengths, shape.vocab_size)
        output = chunk(tokens[None], torch.zeros_like(tokens)[None], None, packed_seq_params=packing)
        return output, lambda logits: (logits.square().sum() * len(LENGTHS), logits.detach().clone())

    with backend.phase():
        run = get_forward_backward_func()
        found: list[torch.Tensor] = run(
            forward_step_func=forward_step,
            data_iterator=[iter(LENGTHS) for _ in chunks] if len(chunks) > 1 else iter(LENGTHS),
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(LENGTHS),
            seq_length=max(sum(lengths) for lengths in LENGTHS),
            micro_batch_size=1,
            forward_only=False,
        )
    return found


class CountedTransfers(gathering._Transfer):
    """Remembers every buffer's memory without keeping it alive."""

    memory: ClassVar[list[StorageWeakRef]] = []

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.memory.append(StorageWeakRef(self.buffer.untyped_storage()))

    @classmethod
    @contextmanager
    def installed(cls) -> Iterator[list[StorageWeakRef]]:
        cls.memory.clear()
        original, gathering._Transfer = gathering._Transfer, cls
        try:
            yield cls.memory
        finally:
            gathering._Transfer = original


def counted(plan: PushPlan, chunks: list[PolicyModel], buffers: list[StorageWeakRef]) -> tuple[list[tuple[str, torch.Tensor]], int, int]:
    """The gathered tensors; the most buffers alive at once; how many later buckets were on their way at every tensor."""
    bucket_of = {name: number for number, bucket in enumerate(plan.buckets) for name in bucket.names}
    gathered, alive, ahead = [], [0], []
    for name, tensor in execute_push_plan(plan, chunks):
        gathered.append((name, tensor))
        alive.append(len({memory for memory in buffers if not memory.expired()}))
        if bucket_of[name] + 1 < len(plan.buckets):
            ahead.append(len(buffers) - bucket_of[name] - 1)
    return gathered, max(alive), min(ahead)


def fp8_checksums(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """What an engine with whole tensors that rounds linear layers to FP8 comes to."""
    halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    rounded = {name: rounded_rows(tensor, largest_of_rows(tensor)) for name, tensor in halves.items() if is_rounded(name)}
    return whole_checksums(halves.items(), torch.bfloat16) | whole_checksums(rounded.items(), torch.float32)


def check(layout: ParallelConfig, model: Path, backend: Backend) -> dict[str, Any]:
    """One model on one layout: the worst logit error on any rank, and whether gathering gave back what was loaded."""
    shape = read_model_shape(str(model))
    initialize_parallel(layout, shape, distributed.world_size(), seed=3)
    chunks = build_policy(shape, layout, dtype=torch.float32, backend=backend, recompute="none", head=gathered_logits(layout))
    with SafetensorsDirectory(str(model)) as files:
        load_hf_weights(chunks, shape, files)
        plan = plan_for(chunks, shape, bucket_bytes=50_000)
        with CountedTransfers.installed() as transfers:
            gathered, most_alive, least_ahead = counted(plan, chunks, transfers)
        expected = {name: files[name] for name in files}
        sums_equal = all(
            policy_checksums(plan, chunks, dtype) == whole_checksums(expected.items(), dtype) for dtype in (torch.float32, torch.bfloat16)
        ) and policy_checksums(plan, chunks, torch.bfloat16, fp8_rows=True) == fp8_checksums(expected)
    # the tensors are kept as they came, all at once: none may change while another bucket travels
    same = sorted(expected) == sorted(name for name, _ in gathered) and all(
        torch.equal(tensor, expected[name]) and tensor.dtype == expected[name].dtype for name, tensor in gathered
    )
    logits = forward_backward(chunks, backend, shape)
    reference = torch.load(model / "logits.pt")
    error = max((float((x[:, : shape.vocab_size] - y).abs().max()) for x, y in zip(logits, reference, strict=False)), default=0.0)
    padding = max((float(x[:, shape.vocab_size :].abs().sum()) for x in logits), default=0.0)
    load_hf_weights(chunks, shape, random_hf_tensors(shape, seed=7))
    drawn = {name: float(tensor.double().sum()) for name, tensor in gather_hf_tensors(chunks, shape, bucket_bytes=1 << 30)}
    buffers = (most_alive, least_ahead, len(plan.buckets))
    ranks = distributed.all_gather_object((error, padding, same, drawn, len(logits), buffers, sums_equal))
    return {
        "logit_error": max(rank[0] for rank in ranks),
        "padding": max(rank[1] for rank in ranks),
        "gathered_equal": all(rank[2] for rank in ranks),
        "random_sums": ranks[0][3],
        "random_equal_on_ranks": all(rank[3] == drawn for rank in ranks),
        "micro_batches_compared": max(rank[4] for rank in ranks),
        "buffers": [rank[5] for rank in ranks],
        "checksums_equal": all(rank[6] for rank in ranks),
        "gradients": gradient_norms(chunks),
    }


def gradient_norms(chunks: list[PolicyModel]) -> dict[str, float]:
    """The norm of each kind of sharded weight's gradient, over all layers and model-parallel ranks."""
    squares = torch.zeros(len(SHARDED_KINDS), dtype=torch.float64)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            for i, kind in enumerate(SHARDED_KINDS):
                if kind in name and parameter.grad is not None:
                    squares[i] += parameter.grad.double().square().sum()
    dist.all_reduce(squares, group=parallel_state.get_model_parallel_group())
    return dict(zip(SHARDED_KINDS, squares.sqrt().tolist(), strict=True))


SHARDED_KINDS = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")


def find(models: Path) -> dict[str, Any]:
    backend = choose_backend("cpu")
    results = {
        f"{layout}/{model.name}": check(ParallelConfig(**fields), model, backend)
        for layout, fields in LAYOUTS[distributed.world_size()].items()
        for model in sorted(models.iterdir())
    }
    return results
