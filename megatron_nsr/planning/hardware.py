"""GPUs that a run can be planned for, by their published peak numbers, and the share of these numbers that programs reach.

May import: types. Sources and the reasons for each share: docs/planning.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_nsr.types import UserError

GIB = 1 << 30

BackendName = Literal["te", "cpu"]


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device and what joins it to others. Bandwidths are one way, bytes a second."""

    name: str
    memory_bytes: float  # that a process may have
    flops: float  # bf16 without sparsity; cpu: float32
    fp8_flops: float  # without sparsity; cpu: none
    memory_bandwidth: float
    link_bandwidth: float  # to the other GPUs of the node
    network_bandwidth: float  # a GPU's share, to other nodes
    host_bandwidth: float  # to the host's memory
    per_node: int
    reserved_bytes: float  # CUDA context, communicators, what the allocator cannot use
    backend: BackendName  # of the layers


# Data sheets of the SXM modules: 989 TFLOP/s bf16, 1,979 FP8, 3.35 and 4.8 TB/s, 900 GB/s NVLink both ways; one 400 Gb/s port a GPU (DGX);
# PCIe 5 x16.
# Memory: what nvidia-smi shows (81,559 and 143,771 MiB) less what the driver keeps.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", 79 * GIB, 989e12, 1979e12, 3.35e12, 450e9, 50e9, 64e9, 8, 3 * GIB, "te"),
        Gpu("h200", 139 * GIB, 989e12, 1979e12, 4.8e12, 450e9, 50e9, 64e9, 8, 3 * GIB, "te"),
        # A process of the quickstart on a laptop's core: float32 products as measured in docs/performance.md, the rest assumed.
        Gpu("cpu", 4 * GIB, 85e9, 0.0, 10e9, 2e9, 1e9, 10e9, 8, 0.7 * GIB, "cpu"),
    )
}

# Shares of the peak. None was measured by this project: there is no GPU run yet.
MATMUL_SHARE = 0.62  # large bf16 products of training, between the other operations of a layer
EXPERT_MATMUL_SHARE = 0.3  # the grouped products of experts, which are small
FP8_MATMUL_SHARE = 0.6  # of the FP8 peak, rounding included
EXPERT_FP8_MATMUL_SHARE = 0.15  # as fast as in bf16: published runs of mixtures in FP8 reach no more
INFERENCE_MATMUL_SHARE = 0.5  # large products in prefill and large decode batches, of the bf16 or of the FP8 peak
MEMORY_SHARE = 0.8  # of memory bandwidth, in decode and in the optimizer
LINK_SHARE = 0.75  # of NVLink, in collectives of tens of MB
NETWORK_SHARE = 0.75
HOST_SHARE = 0.8


def find_gpu(name: str) -> Gpu:
    """By its name in the table, in any case. Raises UserError for another."""
    if name.lower() not in GPUS:
        raise UserError(f"--gpu {name}: known are {', '.join(GPUS)}")
    return GPUS[name.lower()]


def bandwidth(gpu: Gpu, ranks: int, stride: int = 1) -> float:
    """Bytes a second, one way, that each of `ranks` ranks reaches in a ring; ranks are `stride` GPUs apart."""
    if ranks * stride <= gpu.per_node:
        return gpu.link_bandwidth * LINK_SHARE
    return gpu.network_bandwidth * NETWORK_SHARE
