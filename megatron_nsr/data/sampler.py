"""Which prompts each step trains on: a seeded order per epoch, resumable from a state of constant size.

May import: numpy, types.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megatron_nsr.types import UserError


class PromptSampler:
    """Draws batches of prompt indices without end, each prompt at most once an epoch.

    An epoch has count // batch batches; the `count % batch` prompts that are left are dropped, different ones each epoch when
    shuffled. The order depends on (seed, epoch) alone: no global random state is read or written.
    """

    def __init__(self, count: int, batch: int, *, seed: int, shuffle: bool) -> None:
        """Raises UserError where `count` prompts do not fill one batch."""
        if count < batch:
            raise UserError(f"data.prompts_per_step={batch}: there are only {count} prompts; choose {count} or fewer, or give more data")
        self._settings = {"count": count, "batch": batch, "seed": seed, "shuffle": shuffle}
        self._count, self._batch, self._seed, self._shuffle = count, batch, seed, shuffle
        self._drawn = 0  # batches
        self._order: tuple[int, np.ndarray] | None = None  # of the epoch in use

    @property
    def epoch(self) -> int:
        """The epoch of the next batch, from 0."""
        return self._drawn // (self._count // self._batch)

    def next(self) -> list[int]:
        """The next batch of indices into the prompts."""
        batch = self.peek()
        self._drawn += 1
        return batch

    def peek(self, ahead: int = 0) -> list[int]:
        """The batch that `next` returns after `ahead` more calls; counts nothing."""
        epoch, place = divmod(self._drawn + ahead, self._count // self._batch)
        order = self._order_of(epoch)
        return [int(index) for index in order[place * self._batch : (place + 1) * self._batch]]

    def state(self) -> dict[str, int | bool]:
        """What `load_state` needs; JSON-able."""
        return {"drawn": self._drawn, **self._settings}

    def load_state(self, state: Mapping[str, int | bool]) -> None:
        """Continues where `state` was taken. Raises UserError where the data or its settings have changed since."""
        fields = {
            "count": "number of prompts in data.train",
            "batch": "data.prompts_per_step",
            "seed": "run.seed",
            "shuffle": "data.shuffle",
        }
        for name, value in self._settings.items():
            if state[name] != value:
                raise UserError(
                    f"{fields[name]}={value}: the checkpoint was written with {state[name]}; restore that, or start a new run.dir"
                )
        self._drawn = int(state["drawn"])

    def _order_of(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._permutation(epoch))
        return self._order[1]

    def _permutation(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(self._count)
        # Sorting raw Philox words: numpy keeps bit streams stable over releases, but not what Generator.permutation makes of them (NEP 19).
        words = np.random.Philox(key=np.array([self._seed, epoch], dtype=np.uint64)).random_raw(self._count)
        return np.argsort(words, kind="stable")
