"""What the trainer asks of a rollout engine: sample token ids from prompts of token ids, and take new weights.

May import: numpy, torch and the standard library.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol, Self

import numpy as np
import torch

Region = tuple[str, int, int]  # part of a weight: HF name, the first row and the first column of the whole tensor in it


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One prompt and how many responses to sample from it; response `i` is drawn with `seed + i`."""

    prompt_ids: tuple[int, ...]
    seed: int  # seed + n - 1 fits 63 bits
    n: int = 1


@dataclass(frozen=True, slots=True)
class Sampling:
    """Every sampling parameter, none left to a model's generation_config.

    Log-probs are those of the distribution that was sampled: tempered, and where top_p or top_k cut it, cut as well.
    """

    temperature: float  # 0 is greedy
    max_tokens: int  # response budget, the stop id included
    stop_ids: tuple[int, ...]  # any of them ends a response and belongs to it
    top_p: float = 1.0  # 1: off
    top_k: int = -1  # -1: off


@dataclass(frozen=True, slots=True)
class Completion:
    """One response.

    token_ids: int32 [response], the stop id included.
    logprobs: float32 [response], log-probabilities of the sampled ids.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: str  # "stop": the last id is a stop id; "length": the budget or the model's length ran out


class RolloutEngine(Protocol):
    """An engine that holds a copy of the policy's weights.

    Where several ranks host one engine, each of them makes the same calls with the same arguments and gets the same results.
    """

    @property
    def version(self) -> int | None:
        """The version of the weights it samples from; None before the first push and after a failed one."""
        ...

    @property
    def holders(self) -> Sequence[str]:
        """Names of the processes that hold the weights, or groups of them: a server that was started again has another name."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights it computes with."""
        ...

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[Completion]:
        """Samples; returns the responses of the first request in the order of their seeds, then the second's, and so on.

        Raises RuntimeError before the first push (RolloutsLost where another push may help). The caller's random state is left
        as it was.
        """
        ...

    def load_weights(self, tensors: Iterator[tuple[str, torch.Tensor]], version: int) -> int:
        """Replaces every weight by tensors under their HF names, unpadded, of any float type; returns their bytes.

        The iterator may hold collectives: it is consumed to its end exactly once, also when an error is raised after it.
        A tensor must keep its values until this call returns, because an engine may hold back the parts of a fused weight.
        Raises RuntimeError where a weight is missing or unknown; the engine then has no usable weights.
        """
        ...

    def held_checksums(self) -> list[dict[Region, int]]:
        """Checksums (weights.checksums), in `dtype`, of the parts of all weights that this rank computes with, read from where it does.

        One mapping for each process that computes and that this rank speaks for: its own, or the workers of servers.
        """
        ...

    def close(self) -> None:
        """Frees the engine. A process group that existed before the engine stays usable."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class SleepingEngine(Protocol):
    """An engine that can give its device memory back for a while."""

    def sleep(self, level: int) -> None:
        """Frees KV cache and weights. Level 1 keeps the weights' values in host memory, after level 2 a push must bring them."""
        ...

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Takes the memory of one part again; `generate` needs both, a push the weights."""
        ...
