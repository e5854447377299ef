"""The passes of each phase over a step's samples: times, operations and traffic are all counted from them, and so agree.

May import: planning.layout, planning.workload.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_nsr.planning.layout import Layout
from megatron_nsr.planning.workload import Workload, micro_batches


@dataclass(frozen=True, slots=True)
class Passes:
    """One pass forward, and perhaps one back, over all samples that train.

    head: products with the LM head. updates: optimizer steps, each with its part of the samples. critic: of the critic's model.
    """

    backwards: int = 0
    head: int = 0
    updates: int = 0
    critic: bool = False

    def per_schedule(self, workload: Workload, layout: Layout) -> int:
        """Micro-batches of one run of the pipeline's schedule: an update's, or all where nothing is updated between them."""
        return workload.packings * micro_batches(workload, layout) // (self.updates or 1)


MEASURE = Passes(head=1)
JUDGE = Passes(critic=True)


def update_passes(workload: Workload) -> Passes:
    """The policy's: the head measures, and forms the gradients of its input and of its weight."""
    return Passes(backwards=1, head=3, updates=workload.mini_batches)


def step_passes(workload: Workload) -> dict[str, tuple[Passes, ...]]:
    """Of one step, by the names of the trainer's clock (time/*_s) and in their order."""
    found: dict[str, tuple[Passes, ...]] = {}
    if workload.old_logprobs:
        found["old_logprobs"] = (MEASURE,)
    if workload.reference:
        found["reference"] = (MEASURE,)
    if workload.critic:
        found["critic"] = (JUDGE, Passes(backwards=1, updates=workload.critic_mini_batches, critic=True))
    return found | {"update": (update_passes(workload),)}
