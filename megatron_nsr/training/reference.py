"""The reference policy: the initial weights on the host, exchanged with the policy's for one measuring pass a step.

May import: torch. No second model exists, and a checkpoint holds nothing of it: a resumed run takes it from model.path again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class ReferenceWeights:
    """A host copy of this rank's parameters as they are when it is made; it costs as much host memory as they take on the device.

    The optimizer's main weights are never touched: only what a forward pass reads is exchanged.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self._parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        self._held = [_on_host(parameter) for parameter in self._parameters]

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """The model is the reference inside, and afterwards, after an error too, the policy again, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Its own inverse. While the reference is in the model, the policy's weights take its place on the host."""
        for parameter, held in zip(self._parameters, self._held, strict=True):
            current = parameter.detach().clone()
            parameter.copy_(held)
            held.copy_(current)


def _on_host(parameter: torch.Tensor) -> torch.Tensor:
    """Pinned where a GPU reads it: an exchange then runs at the bus's speed."""
    held = torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=parameter.is_cuda)
    return held.copy_(parameter.detach())
