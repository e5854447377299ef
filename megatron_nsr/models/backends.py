"""The Backend protocol (how layers are built and where they run) and the choice between its implementations.

May import: platform, types.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from megatron_nsr.types import UserError

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig


class Backend(Protocol):
    """An implementation of the transformer's layers."""

    name: str
    device: torch.device
    token_dispatcher: str  # how tokens reach the experts: megatron-core's allgather or alltoall

    def config_overrides(self) -> dict[str, Any]:
        """TransformerConfig fields that this backend needs, by name."""

    def block_spec(self, config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
        """The layers of this rank's (virtual) pipeline stage."""

    def phase(self) -> AbstractContextManager[Any]:
        """To be entered around every megatron-core call: building, forward and backward passes, the optimizer, checkpoints."""


def choose_backend(name: Literal["auto", "cpu", "te"]) -> Backend:
    """`auto` takes te where CUDA is available and cpu elsewhere. Raises UserError where the backend cannot run here."""
    if name == "auto":
        name = "te" if torch.cuda.is_available() else "cpu"
    if name == "te":
        from megatron_nsr.models.te_backend import TransformerEngineBackend

        return TransformerEngineBackend()
    if torch.cuda.is_available():
        raise UserError("model.backend='cpu': CUDA is available; use te, or hide the GPUs with CUDA_VISIBLE_DEVICES=''")
    from megatron_nsr.models.cpu_backend import CpuBackend

    return CpuBackend()
