"""SIGTERM and SIGINT as a request to stop at the end of the step. May import: platform.distributed."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

from megatron_nsr.platform import distributed


class StopRequest:
    """Remembers the first signal; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def install(self) -> None:
        """Takes the handlers over; call it again after a library has set its own."""
        signal.signal(signal.SIGTERM, self._remember)
        signal.signal(signal.SIGINT, self._remember)

    def agreed(self, device: torch.device) -> str | None:
        """The signal's name if any rank has received one; the same answer on every rank."""
        if distributed.world_size() == 1:
            return self.signal
        flag = torch.tensor([1.0 if self.signal else 0.0], device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return (self.signal or "a signal on another rank") if flag.item() else None

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
