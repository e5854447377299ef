"""The heads that `fused_head.py` compares: ours, plain torch, and other people's, each under one interface.

May import: megatron_nsr.losses, megatron-core, torch; a peer only inside the function that builds it.
"""

from __future__ import annotations

import atexit
import importlib.util
import site
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_nsr.losses.policy_head import HeadInputs, policy_head
from megatron_nsr.losses.shard import VocabularyShard
from megatron_nsr.losses.terms import LossTerms
from tools.benchmarks.fused_head_measure import ENTROPY_COEFFICIENT, EPS_HIGH, EPS_LOW, SEQUENCES, Outcome, Problem

# Kept out of site-packages: verl's wheel also installs packages named `tests` and `scripts`.
PEER_FOLDER = Path(sys.prefix) / "bench-peers"

Call = Callable[[Problem, bool], Outcome]
LogprobsOf = Callable[[Problem, bool], tuple[Tensor, Tensor | None]]


class Unavailable(Exception):
    """A head that cannot run here, and why."""


@dataclass(frozen=True, slots=True)
class Head:
    """Both calls take a problem and whether entropy belongs to the result.

    forward: what its measuring alone gives, run without gradients; training: a loss to call backward on. None where it has none.
    measures: what `forward` gives beside entropy; loss: what `training` gives beside the entropy bonus, a name in Problem.loss.
    """

    training: Call
    forward: Call | None = None
    measures: str = "log-prob"
    loss: str = "policy"
    entropy: bool = True
    main_grad: bool = False  # the weight's gradient is summed into weight.main_grad


@dataclass(frozen=True, slots=True)
class Variant:
    """build raises Unavailable, or ImportError where the package is missing."""

    name: str
    package: str
    build: Callable[[torch.device], Head]
    note: str = ""


def find_peers() -> None:
    """Makes what `make bench-deps` installed importable."""
    if PEER_FOLDER.is_dir():
        site.addsitedir(str(PEER_FOLDER))


def from_logprobs(logprobs_of: LogprobsOf, *, entropy: bool = True) -> Head:
    """A head that gives log-probs, and entropy if it can: the loss is built on them by autograd."""

    def forward(problem: Problem, with_entropy: bool) -> Outcome:
        return Outcome(None, *logprobs_of(problem, with_entropy))

    def training(problem: Problem, with_entropy: bool) -> Outcome:
        logprobs, token_entropy = logprobs_of(problem, with_entropy)
        loss = problem.loss("policy+entropy" if with_entropy else "policy", logprobs, token_entropy)
        return Outcome(loss, logprobs, token_entropy)

    return Head(training, forward, entropy=entropy)


# Ours


def _ours(problem: Problem, entropy: bool, *, recomputing: bool = False, sign_norms: bool = False) -> Outcome:
    terms = LossTerms(eps_low=EPS_LOW, eps_high=EPS_HIGH, entropy_coefficient=ENTROPY_COEFFICIENT if entropy else 0.0)

    def own_loss(logprobs: Tensor, token_entropy: Tensor) -> Tensor:
        ratio, weights = (logprobs - problem.old_logprobs).exp(), problem.weights
        return -torch.minimum(ratio * weights, ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH) * weights)

    inputs = HeadInputs(
        problem.targets,
        weights=problem.weights,
        scale=problem.scale,
        old_logprobs=problem.old_logprobs,
        own_loss=own_loss if recomputing else None,
        measure_entropy=entropy,
        sign_norms=sign_norms,
    )
    result = policy_head(problem.hidden, problem.weight, inputs, VocabularyShard(0, problem.shape.vocabulary), terms)
    return Outcome(result.loss, result.logprobs, result.entropy if entropy else None)


def _ours_recomputing(problem: Problem, entropy: bool) -> Outcome:
    return _ours(problem, entropy, recomputing=True)


def _ours_with_sign_norms(problem: Problem, entropy: bool) -> Outcome:
    return _ours(problem, entropy, sign_norms=True)


def _ours_measuring(problem: Problem, entropy: bool) -> Outcome:
    inputs = HeadInputs(problem.targets, measure_entropy=entropy)
    result = policy_head(problem.hidden, problem.weight, inputs, VocabularyShard(0, problem.shape.vocabulary), LossTerms())
    return Outcome(None, result.logprobs, result.entropy if entropy else None)


# Plain torch


def _materialised_logprobs(problem: Problem, entropy: bool) -> tuple[Tensor, Tensor | None]:
    return _from_logits(problem.hidden, problem.weight, problem.targets, entropy)


def _from_logits(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    log_p = torch.log_softmax((hidden @ weight.t()).float(), -1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1) if entropy else None


def _materialised_cross_entropy(problem: Problem, entropy: bool) -> Outcome:
    return Outcome(F.cross_entropy((problem.hidden @ problem.weight.t()).float(), problem.targets))


def _cross_entropy_head(call: Call) -> Head:
    """For heads that give nothing but the mean over tokens: compared with one another only."""
    return Head(call, call, measures="cross-entropy", loss="cross-entropy", entropy=False)


def _compiled(device: torch.device) -> Head:
    compiled = torch.compile(_from_logits, dynamic=False)
    return from_logprobs(lambda problem, entropy: compiled(problem.hidden, problem.weight, problem.targets, entropy))


def _torch_chunk(device: torch.device) -> int:
    return 256 if device.type == "cpu" else 2048


def _torch_options(device: torch.device, *, automatic: bool) -> object:
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        raise Unavailable(f"torch {torch.__version__} has no chunked F.linear_cross_entropy")
    return options() if automatic else options(chunking_method=None, batch_chunk_size=_torch_chunk(device))


def _torch_linear_cross_entropy(device: torch.device, *, automatic: bool = False) -> Head:
    options = _torch_options(device, automatic=automatic)

    def logprobs_of(problem: Problem, entropy: bool) -> tuple[Tensor, None]:
        return -F.linear_cross_entropy(problem.hidden, problem.weight, problem.targets, reduction="none", options=options), None

    return from_logprobs(logprobs_of, entropy=False)


def _torch_linear_cross_entropy_mean(device: torch.device) -> Head:
    options = _torch_options(device, automatic=False)
    return _cross_entropy_head(
        lambda problem, entropy: Outcome(F.linear_cross_entropy(problem.hidden, problem.weight, problem.targets, options=options))
    )


# Other people's


def _needs_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise Unavailable("its kernels need CUDA")


def _liger_scaled_cross_entropy(device: torch.device) -> Head:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    def logprobs_of(problem: Problem, entropy: bool) -> tuple[Tensor, Tensor | None]:
        result = Function.apply(problem.hidden, problem.weight, problem.targets, 1.0, -100, 1, entropy)
        return (-result[0], result[1]) if entropy else (-result, None)

    return from_logprobs(logprobs_of)


def _liger_grpo(device: torch.device) -> Head:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, chunk_size=1, epsilon_low=EPS_LOW, epsilon_high=EPS_HIGH, loss_type="bnpo"
    )

    def training(problem: Problem, entropy: bool) -> Outcome:
        sequences = problem.targets.view(SEQUENCES, -1)
        result, _ = loss(
            problem.hidden.view(SEQUENCES, -1, problem.shape.hidden),
            problem.weight,
            sequences,
            torch.ones_like(sequences),
            problem.advantages,
            old_per_token_logps=problem.old_logprobs.view(SEQUENCES, -1),
        )
        return Outcome(result)

    return Head(training, entropy=False)


def _without_package_code(name: str) -> None:
    """Lets `name.module` be imported without running the package's own __init__, which for verl asks for ray, tensordict and more."""
    if name in sys.modules:
        return
    parent, _, leaf = name.rpartition(".")
    if parent:
        folders = [str(Path(folder) / leaf) for folder in sys.modules[parent].__path__]
    else:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}")
        folders = list(spec.submodule_search_locations or [])
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = folders


def _verl_fused_linear(device: torch.device) -> Head:
    _without_package_code("verl")
    _without_package_code("verl.utils")
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    fused = FusedLinearForPPO()
    return from_logprobs(lambda problem, entropy: _with_entropy_if(entropy, fused(problem.hidden, problem.weight, problem.targets)))


def _verl_triton(device: torch.device) -> Head:
    _needs_cuda(device)
    _without_package_code("verl")
    _without_package_code("verl.utils")
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def logprobs_of(problem: Problem, entropy: bool) -> tuple[Tensor, Tensor | None]:
        return _with_entropy_if(entropy, linear_cross_entropy(problem.hidden, problem.weight, problem.targets, 1.0, "none"))

    return from_logprobs(logprobs_of)


def _with_entropy_if(entropy: bool, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    return pair[0], pair[1] if entropy else None


def _cut_cross_entropy(device: torch.device, implementation: str) -> Head:
    if implementation == "cce":
        _needs_cuda(device)
    from cut_cross_entropy import linear_cross_entropy

    def logprobs_of(problem: Problem, entropy: bool) -> tuple[Tensor, None]:
        return -linear_cross_entropy(problem.hidden, problem.weight, problem.targets, reduction="none", impl=implementation), None

    return from_logprobs(logprobs_of, entropy=False)


def _quack(device: torch.device) -> Head:
    _needs_cuda(device)
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return _cross_entropy_head(
        lambda problem, entropy: Outcome(chunked_linear_cross_entropy(problem.hidden, problem.weight, problem.targets))
    )


def _megatron(device: torch.device, *, fused: bool) -> Head:
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    if not dist.is_initialized():
        dist.init_process_group("gloo" if device.type == "cpu" else "nccl", store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(dist.destroy_process_group)
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel()

    def logprobs_of(problem: Problem, entropy: bool) -> tuple[Tensor, None]:
        logits, targets = (problem.hidden @ problem.weight.t())[:, None], problem.targets[:, None]
        if fused:
            return -fused_vocab_parallel_cross_entropy(logits, targets, parallel_state.get_tensor_model_parallel_group())[:, 0], None
        return -vocab_parallel_cross_entropy(logits, targets)[:, 0], None

    return from_logprobs(logprobs_of, entropy=False)


# What the others are compared with: the one of them that computes the same terms.
BASELINES = (
    Variant("materialised logits", "torch", lambda device: from_logprobs(_materialised_logprobs)),
    Variant("materialised logits, mean", "torch", lambda device: _cross_entropy_head(_materialised_cross_entropy)),
)
OURS = (
    Variant("policy_head", "megatron_nsr", lambda device: Head(_ours, _ours_measuring), "gradient formed in the forward pass"),
    Variant("policy_head, own loss", "megatron_nsr", lambda device: Head(_ours_recomputing), "logits computed again backwards"),
    Variant("policy_head, sign norms", "megatron_nsr", lambda device: Head(_ours_with_sign_norms), "every logging.sign_norms_every steps"),
    Variant("policy_head, main_grad", "megatron_nsr", lambda device: Head(_ours, main_grad=True), "the fp32 main_grad counts as an input"),
)
PEERS = (
    Variant("torch.compile", "torch", _compiled, "of materialised logits"),
    Variant("Liger scaled cross-entropy", "liger-kernel", _liger_scaled_cross_entropy, "on a CPU its torch path"),
    Variant("Liger GRPO", "liger-kernel", _liger_grpo, "no forward pass without gradients"),
    Variant("verl FusedLinearForPPO", "verl", _verl_fused_linear, "always computes entropy"),
    Variant("verl Triton", "verl", _verl_triton, "always computes entropy"),
    Variant("cut-cross-entropy", "cut-cross-entropy", lambda device: _cut_cross_entropy(device, "cce")),
    Variant("cut-cross-entropy, compiled", "cut-cross-entropy", lambda device: _cut_cross_entropy(device, "torch_compile")),
    Variant("torch linear_cross_entropy", "torch", _torch_linear_cross_entropy, "chunks of 256 tokens on a CPU, 2048 on CUDA"),
    Variant("torch linear_cross_entropy, auto", "torch", lambda device: _torch_linear_cross_entropy(device, automatic=True)),
    Variant("megatron-core", "megatron-core", lambda device: _megatron(device, fused=False)),
    Variant("megatron-core, fused", "megatron-core", lambda device: _megatron(device, fused=True)),
    Variant("torch linear_cross_entropy, mean", "torch", _torch_linear_cross_entropy_mean),
    Variant("quack, mean", "quack-kernels", _quack),
)
