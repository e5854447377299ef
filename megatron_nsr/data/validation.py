"""The problems that choose a checkpoint: held out of the training problems, or given, and never trained on.

May import: numpy, types, the rest of data.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megatron_nsr.data.prompts import PromptSet
from megatron_nsr.types import Prompt, UserError


def hold_out(train: PromptSet, count: int, *, seed: int) -> tuple[PromptSet, PromptSet]:
    """(what is left to train on, `count` different problems of `train`), both in the file's order.

    Which ones depends on `seed` and the number of different problems alone. A problem that stands in the file several times is held
    out as one, and all its rows leave the training set. Raises UserError where nothing would be left to train on.
    """
    rows: dict[str, list[int]] = {}
    for index, prompt in enumerate(train.prompts):
        rows.setdefault(_problem(prompt), []).append(index)
    if count >= len(rows):
        raise UserError(f"data.validation={count}: data.train has only {len(rows)} different problems; hold out fewer")
    # Raw Philox words, as in the sampler: a split must not change with numpy's release. Its second key is no epoch's number.
    words = np.random.Philox(key=np.array([seed, np.iinfo(np.uint64).max], dtype=np.uint64)).random_raw(len(rows))
    copies = list(rows.values())
    chosen = [copies[index] for index in np.argsort(words, kind="stable")[:count]]
    first, gone = {group[0] for group in chosen}, {index for group in chosen for index in group}
    kept = tuple(prompt for index, prompt in enumerate(train.prompts) if index not in gone)
    return PromptSet(kept, train.too_long), PromptSet(tuple(train.prompts[index] for index in sorted(first)), 0)


def require_disjoint(validation: PromptSet, given: str, others: Mapping[str, PromptSet]) -> None:
    """Raises UserError where a problem of data.validation=`given` is also trained on, or judged by. others: by their config field."""
    for field, other in others.items():
        known = {_problem(prompt) for prompt in other.prompts}
        both = [prompt.id for prompt in validation.prompts if _problem(prompt) in known]
        if both:
            raise UserError(
                f"data.validation={given}: {len(both)} of its {len(validation.prompts)} problems are in {field} too, "
                f"the first is {both[0]}; take them out of one of the two"
            )


def _problem(prompt: Prompt) -> str:
    """What makes two rows the same problem, whatever their ids and white space."""
    return " ".join(prompt.text.split())
