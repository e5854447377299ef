"""The learning rate as a pure function of the step: nothing to save, nothing to lose on resume. May import: types."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    step: int, *, peak: float, final: float, schedule: Literal["constant", "cosine"], warmup_steps: int, total_steps: int
) -> float:
    """The rate of training step `step`, counted from 0: a linear warm-up to `peak`, then constant or half a cosine to `final`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
