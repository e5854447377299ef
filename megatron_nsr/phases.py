"""Who has the device's memory in each phase of a step: the engine while it samples, the policy while it trains.

May import: training, rollout. With `training.offload=none` and `rollout.sleep_level=0` both keep theirs throughout.
"""

from __future__ import annotations

from typing import Literal

from megatron_nsr.rollout.engine import SleepingEngine
from megatron_nsr.training.offload import Offload

Part = Literal["weights", "kv_cache"]


class Phases:
    """Each method makes room for what follows it; one that changes nothing costs nothing. Every rank calls the same ones.

    engine: None until it is there, and where it never sleeps.
    """

    def __init__(self, offload: Offload, sleep_level: int) -> None:
        self._offload, self._sleep_level = offload, sleep_level
        self.engine: SleepingEngine | None = None
        self._awake: set[Part] = {"weights", "kv_cache"}

    def sample(self) -> None:
        """The engine is about to sample, or to start, from the weights that were pushed last."""
        self._offload.take_away()
        self._wake("weights", "kv_cache")

    def train(self) -> None:
        """The policy is about to be measured and updated, or loaded; a push comes before the engine samples again."""
        self._sleep(self._sleep_level)
        self._offload.bring_all()

    def inspect(self) -> None:
        """The policy is about to be measured or saved, and the engine goes on with the weights that it has."""
        self._sleep(min(self._sleep_level, 1))
        self._offload.bring_all()

    def push(self) -> None:
        """The policy's weights are about to be read, and the engine's to be written. The KV cache sleeps on."""
        self._offload.bring_weights()
        self._wake("weights")

    def _sleep(self, level: int) -> None:
        if self.engine is not None and level and "weights" in self._awake:
            self.engine.sleep(level)
            self._awake.clear()

    def _wake(self, *parts: Part) -> None:
        for part in parts:
            if self.engine is not None and part not in self._awake:
                self.engine.wake(part)
                self._awake.add(part)
