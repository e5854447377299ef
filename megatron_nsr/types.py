"""The dataclasses that cross a boundary between packages.

May import: numpy and the standard library; torch for type checking only, so that grader processes start light.
Dimension names: tokens, hidden, vocab_shard, prompts, samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


class UserError(Exception):
    """The user's input is wrong. The message names the field, its value and what would be right; exit status 2."""


class RolloutsLost(RuntimeError):
    """No engine is left that holds the weights: they must be pushed again before anything is sampled. Raised on every rank alike.

    The message names the servers and what happened to each; exit status 1, without a traceback.
    """


class NoVerdicts(RuntimeError):
    """A step's graded responses have no verdict, none of them: there is nothing to learn from. Raised on every rank alike.

    The message says why they have none; exit status 1, without a traceback.
    """


class Outcome(str, Enum):
    """What a grader says of a response. Only `correct` and `wrong` train; `none` is masked and counted."""

    CORRECT = "correct"
    WRONG = "wrong"
    NONE = "none"


class Reason(str, Enum):
    """Why a verdict is what it is."""

    MATCH = "match"  # correct
    MISMATCH = "mismatch"  # wrong: another answer
    NO_BOX = "no_box"  # wrong: no balanced \boxed{}
    UNPARSABLE = "unparsable"  # wrong: a box that is no expression
    TRUNCATED = "truncated"  # wrong (or none, by config): the token budget ran out
    TIMEOUT = "timeout"  # none: the grader passed its deadline
    CRASH = "crash"  # none: the grader died or ran out of memory
    BAD_GOLD = "bad_gold"  # none: the reference answer is unusable


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judgement of one response; `answer` is the text that was extracted, where there was one."""

    outcome: Outcome
    reason: Reason
    answer: str | None = None

    @property
    def reward(self) -> float | None:
        """+1 for correct, -1 for wrong, None where there is no verdict."""
        return {Outcome.CORRECT: 1.0, Outcome.WRONG: -1.0, Outcome.NONE: None}[self.outcome]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem. `text` is the rendered prompt, `token_ids` its ids (empty where nothing is sampled, as in `score`)."""

    id: str
    text: str
    token_ids: tuple[int, ...]
    answer: str  # the reference answer, as the grader reads it
    source: str = ""  # the data set's name
    response: str | None = None  # a reference response, for supervised training
    extra: Mapping[str, Any] = field(default_factory=dict)  # level, type, and whatever a user's grader reads


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One sampled response. `prompt` indexes the step's prompt list.

    response_ids: int32 [response], ends with a stop id unless truncated.
    rollout_logprobs: float32 [response], the engine's log-probabilities of the sampled ids.
    """

    prompt: int
    sample: int
    prompt_ids: tuple[int, ...]
    response_ids: np.ndarray
    rollout_logprobs: np.ndarray
    finish_reason: str  # "stop" or "length"
    weight_version: int
    text: str = ""  # the decoded response, without the stop id

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    @property
    def length(self) -> int:
        """Response tokens, the stop id included."""
        return len(self.response_ids)


@dataclass(frozen=True, slots=True)
class WeightedSample:
    """A kept trajectory with what the objective decided.

    weight: signed; +w reinforces, -w suppresses, 0 carries entropy only.
    scale: what each of its response tokens counts in the mini-batch's loss (aggregation / denominator).
    """

    trajectory: Trajectory
    weight: float
    scale: float


@dataclass(frozen=True, slots=True)
class ContextSplit:
    """How context-parallel ranks share the tokens of a packed micro-batch out.

    Each sequence is cut into 2 * ranks equal pieces, of which rank r has number r from the start and number r from the end: under a causal
    mask all ranks have equally much to do. order: int64 [tokens], each rank's tokens in its own order, rank after rank.
    """

    order: torch.Tensor
    mine: torch.Tensor  # int64 [tokens / ranks]: this rank's part of `order`
    response_rows: torch.Tensor  # int64: where in `mine` response tokens stand, ascending


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """One packed micro-batch in `thd` layout: sequences one after another, inputs x[:-1] against targets x[1:].

    All tensors are [tokens]; `cu_seqlens` is int32 [sequences + 1]. Where `scale` is 0 the token is masked. Context-parallel ranks all hold
    the whole micro-batch; there each sequence ends in masked tokens that make its length a multiple of 2 * ranks.
    """

    tokens: torch.Tensor  # int64
    positions: torch.Tensor  # int64, restart at each sequence
    cu_seqlens: torch.Tensor
    max_seqlen: int
    targets: torch.Tensor  # int64
    response_mask: torch.Tensor  # bool: the target is a response token of a real sample
    response_rows: torch.Tensor  # int64 [response tokens]: where response_mask holds, ascending
    weights: torch.Tensor  # float32, signed: the sample's weight, or the token's advantage once a critic has judged it
    scale: torch.Tensor  # float32, >= 0
    rollout_logprobs: torch.Tensor  # float32, 0 outside the response
    old_logprobs: torch.Tensor | None = None  # float32; None: on-policy, the ratio is exp(lp - stop_gradient(lp))
    reference_logprobs: torch.Tensor | None = None  # float32, of the reference policy; None: there is none
    old_values: torch.Tensor | None = None  # float32, the critic's values before the step's updates
    returns: torch.Tensor | None = None  # float32, what the critic learns
    split: ContextSplit | None = None  # None: no context parallelism, each rank works on all tokens


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """A step's flat metrics; names are `area/name` and the same in every logger."""

    step: int
    values: Mapping[str, float]
