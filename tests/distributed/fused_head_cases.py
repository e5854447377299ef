"""Program for torchrun on four ranks: the head over every way to share vocabulary and tokens, against one rank that has all of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nsr.losses.head_tensors import HeadInputs, HeadOptions, HeadOutputs
from megatron_nsr.losses.policy_head import policy_head
from megatron_nsr.losses.shard import VocabularyShard
from megatron_nsr.losses.terms import LossTerms
from megatron_nsr.platform import distributed
from tests.unit.losses.cases import ALL_TERMS, Case, leaf, random_case, reference_input_grad_sq, relative_error

WORLD, TOKENS, CHUNK = 4, 24, 7
OUTPUTS = ("logprobs", "entropy", "token_loss", "clipped", "input_grad_sq")


@dataclass(frozen=True)
class Layout:
    """tensor: ranks that share the vocabulary. context: ranks that share the tokens. Ranks left over repeat the others' work."""

    tensor: int = 1
    sequence_parallel: bool = False
    context: int = 1


@dataclass(frozen=True)
class Scenario:
    """What a micro-batch holds and how it is trained on; `fields` go to random_case."""

    terms: LossTerms = ALL_TERMS
    vocab: int = 37
    micro_batches: int = 1
    main_grad: bool = False
    tied: bool = False  # the weight is the embedding too
    value_head: bool = False
    own_loss: bool = False
    fields: tuple[tuple[str, Any], ...] = ()


LAYOUTS = {
    "tp2": Layout(2),
    "tp2_sp": Layout(2, True),
    "tp4": Layout(4),
    "tp4_sp": Layout(4, True),
    "cp4": Layout(context=4),
    "tp2_cp2": Layout(2, context=2),
    "tp2_sp_cp2": Layout(2, True, 2),
}
SCENARIOS = {
    "clipped": Scenario(LossTerms()),
    "all_terms": Scenario(),
    "reinforce_with_entropy": Scenario(LossTerms("reinforce", entropy_coefficient=0.05)),
    "probability_on_policy": Scenario(replace(ALL_TERMS, form="probability"), fields=(("on_policy", True), ("temperature", 0.7))),
    "response_rows": Scenario(fields=(("response_rows", True),)),
    "given_factors": Scenario(fields=(("gradient_scale", 1.7), ("loss_gradient", 0.5))),
    "unmeasured_entropy": Scenario(LossTerms(), fields=(("measure_entropy", False),)),
    "measuring": Scenario(fields=(("weights", None), ("scale", None))),
    "one_word_a_rank": Scenario(vocab=4),
    "a_rank_of_padding_only": Scenario(vocab=5),
    "one_word": Scenario(vocab=1),
    "main_grad_over_micro_batches": Scenario(micro_batches=2, main_grad=True),
    "weight_grad_over_micro_batches": Scenario(micro_batches=2),
    "own_loss": Scenario(LossTerms(entropy_coefficient=0.05), own_loss=True),
    "own_loss_in_main_grad": Scenario(LossTerms(), own_loss=True, main_grad=True, fields=(("response_rows", True),)),
    "value_head": Scenario(value_head=True),
    "tied_embedding": Scenario(tied=True, micro_batches=2),
    "sign_norms": Scenario(replace(ALL_TERMS, entropy_coefficient=0.0), fields=(("sign_norms", True),)),
    "sign_norms_with_entropy": Scenario(fields=(("sign_norms", True), ("response_rows", True), ("gradient_scale", 3.0))),
}
# What rounding to bf16 can change: the sums over ranks, and where the gradient goes.
BF16_SCENARIOS = ("all_terms", "a_rank_of_padding_only", "main_grad_over_micro_batches", "own_loss", "sign_norms_with_entropy")
BY_DTYPE = {"float64": tuple(SCENARIOS), "float32": tuple(SCENARIOS), "bfloat16": BF16_SCENARIOS}
CASES = [f"{dtype}/{layout}/{scenario}" for dtype, names in BY_DTYPE.items() for layout in LAYOUTS for scenario in names]


@dataclass(frozen=True)
class Place:
    """This rank's groups and its rank in them."""

    layout: Layout = Layout()
    tensor_group: dist.ProcessGroup | None = None
    tensor_rank: int = 0
    context_group: dist.ProcessGroup | None = None
    context_rank: int = 0

    def parts(self, micro_batches: int) -> list[tuple[slice, slice]]:
        """Of each micro-batch: its tokens, and those of them whose hidden states are here."""
        tokens = TOKENS // self.layout.context // micro_batches
        states = tokens // self.layout.tensor if self.layout.sequence_parallel else tokens
        found = []
        for index in range(micro_batches):
            start = (self.context_rank * micro_batches + index) * tokens
            own = start + (self.tensor_rank * states if self.layout.sequence_parallel else 0)
            found.append((slice(start, start + tokens), slice(own, own + states)))
        return found

    def shard(self, vocab: int) -> VocabularyShard:
        start = self.tensor_rank * self.shard_rows(vocab)
        return VocabularyShard(start, vocab, self.tensor_group, self.layout.sequence_parallel)

    def shard_rows(self, vocab: int) -> int:
        return -(-vocab // self.layout.tensor)

    def rows_of(self, weight: Tensor, padding: float) -> Tensor:
        """This rank's rows of the padded weight."""
        rows = self.shard_rows(len(weight))
        padded = torch.nn.functional.pad(weight, (0, 0, 0, rows * self.layout.tensor - len(weight)), value=padding)
        return padded[self.tensor_rank * rows : (self.tensor_rank + 1) * rows]

    def sum_over_context(self, values: Tensor) -> Tensor:
        values = values.double()
        if self.context_group is not None:
            dist.all_reduce(values, group=self.context_group)
        return values


def places() -> dict[str, Place]:
    """This rank's place in each layout; every rank makes all groups."""
    rank = distributed.rank()
    groups: dict[tuple[int, int], dist.ProcessGroup | None] = {}
    for size, stride in ((2, 1), (4, 1), (2, 2)):  # ranks of a group, and how far apart they are
        for first in (start for start in range(WORLD) if start // stride % size == 0):
            members = [first + i * stride for i in range(size)]
            group = dist.new_group(members)
            if rank in members:
                groups[size, stride] = group
    return {
        name: Place(
            layout,
            groups.get((layout.tensor, 1)),
            rank % layout.tensor,
            groups.get((layout.context, layout.tensor)),
            rank // layout.tensor % layout.context,
        )
        for name, layout in LAYOUTS.items()
    }


class TiedEmbedding(torch.autograd.Function):
    """(weight, words of the micro-batch) -> hidden states: of all tokens, or with sequence parallelism of this rank's part."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, words: Tensor, shard: VocabularyShard) -> Tensor:
        inside = (words >= shard.start) & (words < shard.start + len(weight))
        ctx.columns, ctx.shard, ctx.rows = torch.where(inside, words - shard.start, 0), shard, len(weight)
        ctx.inside = inside[:, None]
        states = shard.sum_over_ranks(torch.where(ctx.inside, weight[ctx.columns], 0))
        if not shard.sequence_parallel:
            return states
        return states.chunk(shard.ranks)[dist.get_rank(shard.group)]

    @staticmethod
    def backward(ctx: Any, d_states: Tensor) -> Any:
        d_states = ctx.shard.all_tokens(d_states)
        d_weight = d_states.new_zeros(ctx.rows, d_states.shape[1])
        return d_weight.index_add(0, ctx.columns, torch.where(ctx.inside, d_states, 0)), None, None


def tokens_of(inputs: HeadInputs, tokens: slice) -> HeadInputs:
    """The inputs of some of the tokens."""
    names = ("targets", "weights", "scale", "old_logprobs", "reference_logprobs", "rollout_logprobs")
    kept = {name: None if getattr(inputs, name) is None else getattr(inputs, name)[tokens] for name in names}
    rows = inputs.rows
    if rows is not None:
        kept["rows"] = rows[(rows >= tokens.start) & (rows < tokens.stop)] - tokens.start
    return replace(inputs, **kept)


def own_loss(inputs: HeadInputs) -> Callable[[Tensor, Tensor], Tensor]:
    """A user's loss: PPO's clip, and something of the entropy."""
    assert inputs.weights is not None and inputs.old_logprobs is not None
    weights, old = inputs.weights, inputs.old_logprobs

    def loss(logprobs: Tensor, entropy: Tensor) -> Tensor:
        ratio = (logprobs - old).exp()
        return -torch.minimum(ratio * weights, ratio.clamp(0.8, 1.2) * weights) + 0.1 * entropy.square()

    return loss


def run(scenario: Scenario, case: Case, place: Place) -> dict[str, Tensor]:
    """Trains on this rank's part; returns its loss, its tokens' outputs, and the gradients of its hidden states and weight rows."""
    shard = place.shard(len(case.weight))
    weight = torch.nn.Parameter(place.rows_of(case.weight.detach(), padding=50.0).clone())
    if scenario.main_grad:
        weight.main_grad = torch.zeros(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32))
    outputs, d_hidden = [], []
    for tokens, own in place.parts(scenario.micro_batches):
        inputs = tokens_of(case.inputs, tokens)
        if scenario.own_loss:
            inputs = replace(inputs, own_loss=own_loss(inputs))
        hidden = leaf(case.hidden[own])
        states = TiedEmbedding.apply(weight, case.inputs.targets.flip(0)[tokens], shard) + hidden if scenario.tied else hidden
        output = policy_head(states, weight, inputs, shard, scenario.terms, HeadOptions(case.temperature, CHUNK))
        loss = output.loss * inputs.loss_gradient
        if scenario.value_head:
            loss = loss + (states.sum(-1) - case.inputs.targets[own]).square().sum()
        if inputs.trains:
            loss.backward()
        if scenario.main_grad:
            weight.grad = None  # as data parallelism's hook leaves it
        outputs.append(output)
        d_hidden.append(torch.zeros_like(hidden) if hidden.grad is None else hidden.grad)
    d_weight = weight.main_grad if scenario.main_grad else weight.grad
    return {
        "loss": torch.stack([output.loss.detach() for output in outputs]).sum(),
        **token_outputs(outputs),
        "d_hidden": torch.cat(d_hidden),
        "d_weight": torch.zeros_like(weight) if d_weight is None else d_weight,
    }


def token_outputs(outputs: list[HeadOutputs]) -> dict[str, Tensor]:
    """Of all micro-batches, by name."""
    present = [name for name in OUTPUTS if getattr(outputs[0], name) is not None]
    return {name: torch.cat([getattr(output, name) for output in outputs]) for name in present}


def errors(scenario: Scenario, case: Case, place: Place, whole: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors of this rank's part against `whole`, one rank's results; losses and d_weight are summed over the tokens' ranks."""
    got = run(scenario, case, place)
    parts = place.parts(scenario.micro_batches)
    want = {name: torch.cat([whole[name][tokens] for tokens, _ in parts]) for name in OUTPUTS if name in whole}
    want["loss"], want["d_weight"] = whole["loss"], place.rows_of(whole["d_weight"], padding=0.0)
    want["d_hidden"] = torch.cat([whole["d_hidden"][own] for _, own in parts])
    if case.inputs.sign_norms:
        want["input_grad_sq"] = torch.cat([reference_input_grad_sq(case, scenario.terms)[tokens] for tokens, _ in parts])
    again = run(scenario, case, place)
    assert got.keys() == want.keys() == again.keys()
    found = {"repeated": float(not all(torch.equal(got[name], again[name]) for name in got))}
    for name, values in want.items():
        summed = place.sum_over_context(got[name]) if name in ("loss", "d_weight") else got[name]
        found[name] = relative_error(summed, values)
    return found


def find() -> dict[str, dict[str, float]]:
    """By case, the worst errors of any rank."""
    by_layout, found = places(), {}
    for dtype, names in BY_DTYPE.items():
        for name in names:
            scenario = SCENARIOS[name]
            case = random_case(3, tokens=TOKENS, vocab=scenario.vocab, dtype=getattr(torch, dtype), **dict(scenario.fields))
            whole = run(scenario, case, Place())
            for layout, place in by_layout.items():
                found[f"{dtype}/{layout}/{name}"] = errors(scenario, case, place, whole)
    ranks = distributed.all_gather_object(found)
    return {case: {name: max(rank[case][name] for rank in ranks) for name in found[case]} for case in found}
