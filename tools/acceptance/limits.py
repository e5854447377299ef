"""What this device can do at most, measured in the same process as what is held against it: products, and copies inside its memory.

May import: tools.benchmarks.fused_head_measure, torch, planning.hardware.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_nsr.planning.hardware import GPUS
from tools.acceptance.record import NotRun, Record, Step
from tools.benchmarks.fused_head_measure import CpuMeter, CudaMeter, Meter

FP8 = torch.float8_e4m3fn
PEAK_MARGIN = 1.02  # clocks differ a little from those of the data sheet
CLOCKS_AGREE = 1.25
PRODUCT_ERROR = 0.03  # fast accumulation in FP8 keeps few bits


@dataclass(frozen=True, slots=True)
class Sizes:
    """products: sides of the square matrices; copied_mib: of the tensor that is copied."""

    products: tuple[int, ...]
    copied_mib: int
    repeats: int


GPU = Sizes((4096, 8192, 16384), 2048, 20)
DRY = Sizes((128, 192), 4, 3)


def meter_of(device: torch.device) -> Meter:
    return CudaMeter() if device.type == "cuda" else CpuMeter()


def seconds_of(device: torch.device, call: Callable[[], object], rounds: int = 5) -> float:
    """Median seconds of a call after one that warms up: between two events on a GPU, by the wall clock elsewhere."""
    meter = meter_of(device)
    call()
    return statistics.median(meter.seconds(call)[-1] for _ in range(rounds))


def wall_seconds(device: torch.device, call: Callable[[], object]) -> float:
    """Of one call, all that it left to the device included."""
    _wait_for(device)
    start = time.perf_counter()
    call()
    _wait_for(device)
    return time.perf_counter() - start


def measure_limits(record: Record, device: torch.device) -> None:
    """Fills record.limits: bf16_tflops, fp8_tflops, copy_gb_s (bytes read and bytes written)."""
    sizes = DRY if record.dry else GPU
    with record.step("limits: bf16 products") as step:
        record.limits["bf16_tflops"] = _products(step, device, sizes, _bf16_operands, _bf16_product)
        _below_peak(step, record.limits["bf16_tflops"], 1.0)
    with record.step("limits: fp8 products") as step:
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
            raise NotRun("this GPU has no products in FP8")
        record.limits["fp8_tflops"] = _products(step, device, sizes, _fp8_operands, _fp8_product)
        _below_peak(step, record.limits["fp8_tflops"], 2.0)
    with record.step("limits: copies") as step:
        record.limits["copy_gb_s"] = _copies(step, device, sizes)


Operands = tuple[Tensor, Tensor]


def _products(
    step: Step,
    device: torch.device,
    sizes: Sizes,
    operands: Callable[[int, torch.device], Operands],
    product: Callable[[Tensor, Tensor], Tensor],
) -> float:
    """TFLOP/s of the fastest size: a limit that is taken too low would flatter what is held against it."""
    rates = {}
    for side in sizes.products:
        a, b = operands(side, device)

        def several(a: Tensor = a, b: Tensor = b) -> None:
            for _ in range(sizes.repeats):
                product(a, b)

        rates[side] = sizes.repeats * 2 * side**3 / seconds_of(device, several, rounds=3) / 1e12
        if side == sizes.products[0]:
            _check_product(step, a, b, product)
            _check_clock(step, device, several)
    step.figure(tflops_by_side=rates)
    return max(rates.values())


def _bf16_operands(side: int, device: torch.device) -> Operands:
    """Random numbers: zeros would let a GPU clock higher than real data does."""
    generator = torch.Generator(device).manual_seed(side)
    a, b = (torch.randn(side, side, generator=generator, device=device).bfloat16() for _ in range(2))
    return a, b


def _bf16_product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.t()


def _fp8_operands(side: int, device: torch.device) -> Operands:
    a, b = _bf16_operands(side, device)
    return a.to(FP8), b.to(FP8)


def _fp8_product(a: Tensor, b: Tensor) -> Tensor:
    """The fastest there is: a limit. cuBLAS wants the second side column-major, which a transposed view is."""
    one = torch.ones((), device=a.device)
    return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)


def _check_product(step: Step, a: Tensor, b: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> None:
    """A few rows in float64: a rate of wrong numbers is none. The product with a side that was not transposed is the wrong one."""
    rows = slice(0, 16)
    exact, untransposed = a[rows].double() @ b.double().t(), a[rows].double() @ b.double()
    got = product(a, b)[rows].double()
    step.check("relative error of the product", _relative(got, exact), at_most=PRODUCT_ERROR, wrong=_relative(got, untransposed))


def _check_clock(step: Step, device: torch.device, several: Callable[[], None]) -> None:
    """Events and the wall clock must tell the same, or the rate is of something else than these products."""
    measured = seconds_of(device, several, rounds=3)
    wall = statistics.median(wall_seconds(device, several) for _ in range(3))
    step.figure(seconds_measured=measured, seconds_by_wall_clock=wall)
    if device.type == "cuda":
        step.check("wall clock over device clock", wall / measured, at_most=CLOCKS_AGREE, at_least=1 / CLOCKS_AGREE)


def _below_peak(step: Step, tflops: float, of_bf16: float) -> None:
    """A rate beyond the data sheet's is an error of measurement. of_bf16: the peak over that of bf16."""
    if not torch.cuda.is_available():
        return
    name = torch.cuda.get_device_name().lower()
    for key, gpu in GPUS.items():
        if gpu.backend == "te" and key in name:
            peak = gpu.flops * of_bf16 / 1e12
            step.check(f"share of {gpu.name}'s peak of {peak:.0f} TFLOP/s", tflops / peak, at_most=PEAK_MARGIN, at_least=0.3)


def _copies(step: Step, device: torch.device, sizes: Sizes) -> float:
    """GB/s, bytes read and bytes written."""
    source = torch.randint(0, 256, (sizes.copied_mib * 2**20,), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    seconds = seconds_of(device, lambda: target.copy_(source))
    step.check("copied whole", torch.equal(source, target))
    rate = 2 * source.numel() / seconds / 1e9
    step.figure(gb_s=rate)
    return rate


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
