"""The Triton kernels where there is no GPU: run in Triton's interpreter, and compiled for a Hopper GPU without being launched."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from megatron_nsr.losses import triton_rows
from megatron_nsr.losses.shard import Distribution
from megatron_nsr.losses.terms import LossTerms, TokenInputs
from tests.unit.losses.cases import ALL_TERMS

ROOT = Path(__file__).parents[3]
COLUMNS = 151_936 // 8  # Qwen's vocabulary over 8 GPUs
TRAINING_WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # its import fails
import torch
from megatron_nsr.losses.policy_head import HeadInputs, policy_head
from megatron_nsr.losses.shard import VocabularyShard
from megatron_nsr.losses.terms import LossTerms
inputs = HeadInputs(torch.zeros(3, dtype=torch.long), torch.ones(3), torch.ones(3))
policy_head(torch.randn(3, 4, requires_grad=True), torch.randn(9, 4), inputs, VocabularyShard(0, 9), LossTerms()).loss.backward()
"""


def run(*arguments: str, **environment: str) -> str:
    """What a program that must succeed prints."""
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-4000:]
    return result.stdout


def test_the_kernels_agree_with_torch_and_float64_in_tritons_interpreter() -> None:
    run("-m", "pytest", "-q", "tests/unit/losses/triton_program.py", TRITON_INTERPRET="1")


def test_the_head_on_a_cpu_needs_no_triton() -> None:
    run("-c", TRAINING_WITHOUT_TRITON)


class HopperDriver:
    """Stands for the driver of a GPU that is not there, as far as compiling asks it."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return -1  # so that no real device is given these kernels

    def get_current_stream(self, device: int) -> int:
        return 0


def vectors(rows: int, count: int = 6) -> tuple[Tensor, ...]:
    """Views of one tensor: unless `rows` is a multiple of 4, few of them are aligned."""
    return torch.zeros(count, rows).unbind(0)


def targets(rows: int) -> Tensor:
    return torch.zeros(2, rows, dtype=torch.long)[1]


def gradient(rows: int, out_dtype: torch.dtype) -> None:
    logits, (*softmax, grad_logprob, grad_entropy) = torch.empty(rows, COLUMNS), vectors(rows)
    out = logits if out_dtype == logits.dtype else torch.empty_like(logits, dtype=out_dtype)
    triton_rows.d_logits(logits, Distribution(*softmax), targets(rows), grad_logprob, grad_entropy, 1.0, out)


CALLS: dict[str, Callable[[int], object]] = {
    "statistics": lambda rows: triton_rows.statistics(torch.empty(rows, COLUMNS), targets(rows), 1.0, entropy=True),
    "gradient": lambda rows: gradient(rows, torch.float32),
    "gradient in bf16": lambda rows: gradient(rows, torch.bfloat16),
    "loss": lambda rows: triton_rows.loss_terms(torch.empty(8, 4, rows), TokenInputs(*vectors(rows, 5)), ALL_TERMS),
    "on-policy loss": lambda rows: triton_rows.loss_terms(torch.empty(1, 4, rows), TokenInputs(*vectors(rows, 2)), LossTerms()),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, int], Any]]:
    """(name of a call, rows) -> the kernel that the call would launch on a Hopper GPU, compiled unless it was."""
    kernels: list[Any] = []
    launch = JITFunction.run

    def compile_only(kernel: JITFunction[Any], *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernels.append(launch(kernel, *arguments, grid=grid, warmup=True, **options))

    def call(name: str, rows: int) -> Any:
        CALLS[name](rows)
        return kernels.pop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        patch.setattr(triton.runtime.driver, "_active", HopperDriver())
        patch.setattr(JITFunction, "run", compile_only)
        yield call


def resources(kernel: Any, folder: Path) -> dict[str, int]:
    """Registers a thread, and bytes a thread of stack and local memory, of a compiled kernel."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    found = run_tool(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(binary))
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", found)}


def run_tool(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("name", CALLS)
def test_a_kernel_compiles_for_hopper_into_registers_only(compiled: Callable[[str, int], Any], name: str, tmp_path: Path) -> None:
    found = resources(compiled(name, 64), tmp_path)
    assert found["REG"] <= 128 and found["STACK"] == found["LOCAL"] == 0


@pytest.mark.parametrize("name", ["statistics", "gradient", "gradient in bf16"])
def test_rows_are_read_and_written_16_bytes_at_a_time(compiled: Callable[[str, int], Any], name: str) -> None:
    program = compiled(name, 64).asm["ptx"]
    assert re.search(r"ld\.global\S*\.v4\.", program)
    assert name == "statistics" or re.search(r"st\.global\S*\.v4\.", program)
    assert "atom." not in program and "red.global" not in program


def test_a_bf16_gradient_is_rounded_to_nearest(compiled: Callable[[str, int], Any]) -> None:
    assert "cvt.rn.bf16" in compiled("gradient in bf16", 64).asm["ptx"]


@pytest.mark.parametrize("name", CALLS)
def test_other_numbers_of_rows_compile_nothing_new(compiled: Callable[[str, int], Any], name: str) -> None:
    assert all(compiled(name, rows) is compiled(name, 64) for rows in (1, 7, 10))
