"""One step's rollouts over all engines: prompts in, the same complete list of trajectories out on every rank.

May import: types, platform, this package, numpy and torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Literal, Self, TypeVar

import torch
import torch.distributed as dist

from megatron_nsr.platform.distributed import TIMEOUT
from megatron_nsr.rollout.ahead import Ahead
from megatron_nsr.rollout.engine import Completion, RolloutEngine, SampleRequest, Sampling
from megatron_nsr.rollout.held_weights import wrong_tensors
from megatron_nsr.rollout.pushed_weights import few
from megatron_nsr.rollout.seeds import Purpose, sample_seed
from megatron_nsr.types import Prompt, RolloutsLost, Trajectory

Verification = Literal["always", "first", "never"]
Checksums = Callable[[torch.dtype], Mapping[str, int]]
Item = TypeVar("Item")


class Rollouts:
    """Spreads prompts over the engines, each hosted by `engine_ranks` consecutive ranks, and gathers the trajectories.

    Every rank makes one and makes the same calls. Owns the engine: close() closes it. verify_push: which pushes are followed by a
    comparison of what the engines then hold with what the policy holds; `first` is the first one that an engine's process takes part in.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        tokenizer_decode: Callable[[Sequence[int]], str],
        *,
        run_seed: int,
        rank: int = 0,
        world_size: int = 1,
        engine_ranks: int = 1,
        verify_push: Verification = "first",
    ) -> None:
        self._engine = engine
        self.ahead = Ahead(engine)
        self._decode = tokenizer_decode
        self._run_seed = run_seed
        self._engines = world_size // engine_ranks
        self._engine_index = rank // engine_ranks
        self._verify_push, self._verified = verify_push, set[tuple[int, str]]()
        self._speaks_for_engine = rank % engine_ranks == 0
        # Python objects travel over gloo: NCCL would take them through GPU memory
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if world_size > 1 else None

    def generate(self, prompts: Sequence[Prompt], *, step: int, samples: int, sampling: Sampling, purpose: Purpose) -> list[Trajectory]:
        """Samples `samples` responses a prompt; the list is ordered by (prompt, sample) and the same on every rank.

        Seeds derive from (run seed, step, prompt id, sample, purpose), so the tokens do not depend on the number of engines.
        What `draw_ahead` drew for these prompts is returned instead of being drawn again. Raises RolloutsLost on every rank
        where an engine lost its weights.
        """
        requests = self._requests(prompts, step, samples, purpose)
        lost: list[RolloutsLost] = []
        sampled: list[Trajectory] = []
        try:
            sampled = self._sample(prompts, requests, sampling)
        except RolloutsLost as error:
            lost = [error]
        if lost := self._gather(lost):
            raise lost[0]
        return sorted(self._gather(sampled), key=lambda trajectory: (trajectory.prompt, trajectory.sample))

    def draw_ahead(self, prompts: Sequence[Prompt], *, step: int, samples: int, sampling: Sampling) -> None:
        """Begins to sample for a later step's `generate` with purpose "train", beside whatever the caller does next.

        From the weights that the engine has now: the next push waits until it is done.
        """
        self.ahead.start(list(self._requests(prompts, step, samples, "train").values()), sampling)

    def _requests(self, prompts: Sequence[Prompt], step: int, samples: int, purpose: Purpose) -> dict[int, SampleRequest]:
        """By the prompt's index: this engine's share."""
        mine = range(self._engine_index, len(prompts), self._engines)
        seeds = {i: sample_seed(self._run_seed, step, prompts[i].id, 0, purpose=purpose) for i in mine}
        return {i: SampleRequest(prompts[i].token_ids, seed, samples) for i, seed in seeds.items()}

    def _sample(self, prompts: Sequence[Prompt], requests: Mapping[int, SampleRequest], sampling: Sampling) -> list[Trajectory]:
        asked = list(requests.values())
        drawn = self.ahead.take(asked, sampling)
        completions = drawn.completions if drawn else self._engine.generate(asked, sampling)
        version = drawn.version if drawn else self._engine.version
        if not self._speaks_for_engine:
            return []
        assert version is not None  # generate raises without weights
        slots = ((prompt, sample) for prompt, request in requests.items() for sample in range(request.n))
        return [
            self._trajectory(prompts[prompt], prompt, sample, completion, version)
            for (prompt, sample), completion in zip(slots, completions, strict=True)
        ]

    def push(self, tensors: Iterator[tuple[str, torch.Tensor]], version: int, checksums: Checksums) -> dict[str, float]:
        """Gives this rank's engine new weights under their HF names, and returns metrics; see RolloutEngine.load_weights.

        checksums: gives the policy's, by HF name, in a dtype (weights.checksums); called, by all ranks, where the push is verified.
        Raises RuntimeError on every rank where any engine does not hold what the policy holds.
        """
        self.ahead.settle()
        pushed_bytes = self._engine.load_weights(tensors, version)
        holders = set(self._gather([(self._engine_index, name) for name in self._engine.holders if self._speaks_for_engine]))
        if self._verify_push == "always" or (self._verify_push == "first" and holders - self._verified):
            self._verified |= holders if self._verify(version, checksums(self._engine.dtype)) else set()
        return {"rollout/push_bytes": float(pushed_bytes), "rollout/engines": float(len(holders))}

    def _verify(self, version: int, policy: Mapping[str, int]) -> bool:
        """Whether there was something to compare: servers may all be gone for the moment."""
        held = self._gather([(self._engine_index, sums) for sums in self._engine.held_checksums()])
        mine = wrong_tensors(policy, [sums for engine, sums in held if engine == self._engine_index])
        found = self._gather([(self._engine_index, name) for name in mine if held])
        if found:
            engines, names = (sorted(set(column)) for column in zip(*found, strict=True))
            raise RuntimeError(
                f"push of version {version}: {len(names)} tensors in rollout engine {', '.join(map(str, engines))} are not "
                f"those of the policy: {few(names)}"
            )
        return bool(held)

    def close(self) -> None:
        """Closes the engine."""
        self.ahead.close()
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _trajectory(self, prompt: Prompt, index: int, sample: int, completion: Completion, version: int) -> Trajectory:
        stopped = completion.finish_reason == "stop"
        spoken = completion.token_ids[:-1] if stopped else completion.token_ids
        return Trajectory(
            prompt=index,
            sample=sample,
            prompt_ids=prompt.token_ids,
            response_ids=completion.token_ids,
            rollout_logprobs=completion.logprobs,
            finish_reason=completion.finish_reason,
            weight_version=version,
            text=self._decode(spoken.tolist()),
        )

    def _gather(self, mine: list[Item]) -> list[Item]:
        """The items of all ranks, in their order."""
        if self._group is None:
            return mine
        parts: list[list[Item]] = [[] for _ in range(dist.get_world_size(self._group))]
        dist.all_gather_object(parts, mine, group=self._group)
        return [item for part in parts for item in part]
