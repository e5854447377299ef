"""What of the te backend can be held without a GPU and without Transformer Engine."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.tensor_parallel import layers

from megatron_nsr.models.te_backend import TransformerEngineBackend, require_fp8
from megatron_nsr.types import UserError


@pytest.mark.parametrize("kernel", [True, False])
def test_weight_gradients_are_fused_where_megatron_core_can(monkeypatch: pytest.MonkeyPatch, kernel: bool) -> None:
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", kernel)
    backend = object.__new__(TransformerEngineBackend)
    assert backend.config_overrides()["gradient_accumulation_fusion"] is kernel


def test_a_machine_without_fp8_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(available: bool, reason: str) -> Any:
        return lambda return_reason: (available, reason)

    engine = SimpleNamespace(is_fp8_available=answer(True, ""), is_fp8_block_scaling_available=answer(False, "needs\nCUDA 12.9."))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", engine)
    require_fp8("delayed")
    with pytest.raises(UserError, match=r"^model\.fp8=blockwise: Transformer Engine says of this machine: needs CUDA 12\.9\.$"):
        require_fp8("blockwise")
