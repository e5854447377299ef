"""Bootstrap intervals of a mean over problems.

May import: numpy.
"""

from __future__ import annotations

import numpy as np

RESAMPLES = 1000
SEED = 20250601
MIN_PROBLEMS = 2  # drawing from a single one gives it every time: an interval of no width, which would say that the mean is certain
CHUNK = 100  # resamples drawn at once: [CHUNK, problems] counts live in memory


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Percentiles 2.5 and 97.5 of the column means of `values`, problems drawn with replacement: low, high, float64 [columns].

    values: float [problems, columns]; NaN entries are left out of a mean. All columns share the 1,000 draws, which are the same in every
    call on as many problems: columns, and calls on the same problems, can be subtracted.
    """
    generator = np.random.default_rng(SEED)
    problems = len(values)
    known = np.isfinite(values)
    filled = np.where(known, values, 0.0)
    means = []
    for _ in range(RESAMPLES // CHUNK):
        counts = generator.multinomial(problems, np.full(problems, 1 / problems), size=CHUNK).astype(float)
        with np.errstate(invalid="ignore", divide="ignore"):
            means.append((counts @ filled) / (counts @ known))
    low, high = np.nanpercentile(np.concatenate(means), [2.5, 97.5], axis=0)
    return low, high
