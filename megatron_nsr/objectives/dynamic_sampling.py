"""DAPO's dynamic sampling (arXiv 2503.14476, section 3.2): prompts that teach nothing give way to further ones. May import: types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_nsr.types import Outcome, Prompt, Trajectory, Verdict


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt's responses and what was said of them."""

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def mixed(self) -> bool:
        """Whether it has a correct response and a wrong one: otherwise its group-relative advantages are all 0."""
        return {Outcome.CORRECT, Outcome.WRONG} <= {verdict.outcome for verdict in self.verdicts}


def grouped(prompts: Sequence[Prompt], trajectories: Sequence[Trajectory], verdicts: Sequence[Verdict], samples: int) -> list[Group]:
    """The groups of a round, whose trajectories are ordered by prompt and then by sample."""
    places = (slice(index * samples, (index + 1) * samples) for index in range(len(prompts)))
    return [Group(prompt, tuple(trajectories[place]), tuple(verdicts[place])) for prompt, place in zip(prompts, places, strict=True)]


def refilled(groups: Sequence[Group], further: Sequence[Group]) -> list[Group]:
    """Groups that are not mixed are replaced, in order, by further ones that are; as many stay as there are too few."""
    spare = iter([group for group in further if group.mixed])
    return [group if group.mixed else next(spare, group) for group in groups]
