"""The sizes in which the comparison can be run, and the puzzles that were tried for it. May import: the plan."""

from __future__ import annotations

from dataclasses import replace

from examples.quickstart.corpus import Author
from examples.quickstart.puzzle import Ranges
from examples.reproduction.plan import METHODS, Scale, Task

FOUR, FIVE, SIX = (Ranges(numbers=count) for count in (4, 5, 6))
# Some operators come seldom: then some puzzles are much harder than others, and guessing does not fill the right end of the curve.
SELDOM = "++++--*"
CAREFUL = Author(right=0.8, box_wrong=0.3, slip=0.15)
TASK = Task(replace(SIX, operators=SELDOM), 1000, CAREFUL, test=150)
# One rate for all methods, as in the paper.
RATES = dict.fromkeys(METHODS, 1e-4)

SCALES = {
    "one": Scale(
        "one",
        TASK,
        bases=(1,),
        seeds=(1, 2, 3),
        steps=40,
        long_steps=120,
        every=20,
        samples=64,
        base_samples=128,
        methods=tuple(name for name in METHODS if name != "ppo"),  # left out to stay within the hour
        rates=RATES,
    ),
    "full": Scale(
        "full",
        TASK,
        bases=(1, 2, 3),
        seeds=(1, 2, 3, 4, 5),
        steps=40,
        long_steps=160,
        every=20,
        samples=64,
        search_rates=(2.5e-5, 5e-5, 1e-4, 2e-4),
        search_seeds=(101,),
    ),
    # A rehearsal of everything that `full` does, in minutes; its numbers mean nothing.
    "tiny": Scale(
        "tiny",
        Task(FOUR, base_steps=60, validation=8, test=8),
        bases=(1,),
        seeds=(1, 2),
        steps=2,
        long_steps=4,
        every=2,
        samples=64,
        base_samples=64,
        corpus_size=3000,
        search_rates=(1e-4, 2e-4),
        search_seeds=(101,),
    ),
}

CANDIDATES = tuple(
    Scale(name, task, bases=(1,), seeds=(), steps=0, long_steps=0, every=0, samples=256)
    for name, task in {
        "4_numbers_600_steps": Task(FOUR, 600),
        "4_numbers_1500_steps": Task(FOUR, 1500),
        "5_numbers_600_steps": Task(FIVE, 600),
        "5_numbers_1500_steps": Task(FIVE, 1500),
        "5_numbers_seldom": Task(replace(FIVE, operators=SELDOM), 1000, CAREFUL),
        "6_numbers_seldom": Task(replace(SIX, operators=SELDOM), 1000, CAREFUL),
    }.items()
)
