"""The registry of metric names and RUN/metrics.jsonl, the file every number of a run can be read back from.

May import: types and the standard library.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from megatron_nsr.observability.run_directory import write_atomic
from megatron_nsr.types import StepMetrics, UserError

# name: meaning, unit. `<...>` stands for a part that the run decides. docs/metrics.md holds the same table, and a test compares the two.
METRICS: dict[str, str] = {
    "reward/correct_ratio": "correct responses among those with a verdict, 0 to 1",
    "reward/fully_solved_ratio": "prompts whose every response with a verdict is correct, share of prompts, 0 to 1",
    "reward/never_solved_ratio": "prompts whose every response with a verdict is wrong, share of prompts, 0 to 1",
    "reward/no_verdict_ratio": "responses without a verdict, those that reward.truncated masks included, 0 to 1",
    "reward/timeout_ratio": "responses without a verdict because the grader passed its deadline, 0 to 1",
    "reward/crash_ratio": "responses without a verdict because the grader raised, died or ran out of memory, 0 to 1",
    "reward/bad_gold_ratio": "responses without a verdict because the reference answer is unusable, 0 to 1",
    "reward/truncated_ratio": "responses that ran out of tokens, 0 to 1",
    "reward/truncated_ratio_nsr": "wrong responses that ran out of tokens, share of the wrong ones, 0 to 1",
    "reward/unique_answers_mean": "different answers, by their text, among a prompt's responses, mean over prompts, count; "
    "with a grader that tells answers",
    "rollout/response_tokens_mean": "mean response length, tokens",
    "rollout/response_tokens_mean_psr": "mean length of correct responses, tokens",
    "rollout/response_tokens_mean_nsr": "mean length of wrong responses, tokens",
    "rollout/response_tokens_max": "longest response, tokens",
    "rollout/logprob_psr": "mean log-probability of the tokens of correct responses, trained on or not, in the engine, nats a token",
    "rollout/logprob_nsr": "mean log-probability of the tokens of wrong responses, trained on or not, in the engine, nats a token",
    "rollout/logprob_gap_mean": "mean |engine - policy| log-probability of sampled tokens, nats",
    "rollout/logprob_gap_max": "largest |engine - policy| log-probability of a sampled token, nats",
    "rollout/correction_mean": "mean weight that the rollout correction puts on a trained token, 1 where engine and policy agree",
    "rollout/weight_version": "version of the policy that sampled the step's responses, count of pushes",
    "rollout/staleness": "steps that the policy has made since the weights that sampled the step's responses, mean",
    "rollout/rounds": "batches of prompts that were sampled for the step; more than 1 with dynamic sampling alone",
    "rollout/push_bytes": "weights handed to each engine after the step's update, bytes",
    "rollout/engines": "engines that took these weights: of the run's own, or servers, of which some may be gone for a while",
    "policy/loss": "loss of the update, entropy bonus and KL term included, mean over the step's mini-batches, nats",
    "policy/loss_psr": "the part of the policy loss that correct responses carry, without entropy bonus and KL term, nats",
    "policy/loss_nsr": "the part of the policy loss that wrong responses carry, without entropy bonus and KL term, nats",
    "policy/aux_loss": "load-balancing loss of the routers without its coefficient, mean over layers and trained sequences, "
    "1 where experts are used evenly; with objective.router_aux_loss above 0",
    "policy/grad_norm": "global gradient norm before clipping, mean over the step's mini-batches",
    "policy/grad_norm_head_psr": "gradient norm that correct responses send into the LM head's input, entropy bonus excluded",
    "policy/grad_norm_head_nsr": "gradient norm that wrong responses send into the LM head's input, entropy bonus excluded",
    "policy/grad_norm_psr": "whole gradient's norm of correct responses alone, without entropy bonus and KL term, "
    "every logging.probe_every steps",
    "policy/grad_norm_nsr": "whole gradient's norm of wrong responses alone, without entropy bonus and KL term, "
    "every logging.probe_every steps",
    "policy/grad_cosine": "cosine between the two whole gradients, -1 to 1, every logging.probe_every steps",
    "policy/clip_fraction_psr": "tokens of correct responses whose gradient the ratio clip zeroes, 0 to 1",
    "policy/clip_fraction_nsr": "tokens of wrong responses whose gradient the ratio clip zeroes, 0 to 1",
    "policy/entropy": "mean entropy of the policy at response tokens, those of dropped responses estimated from objective.dropped_share "
    "of them, nats a token",
    "policy/entropy_psr": "mean entropy of the policy at trained tokens of correct responses, nats a token",
    "policy/entropy_nsr": "mean entropy of the policy at trained tokens of wrong responses, nats a token",
    "policy/logprob": "mean log-probability of response tokens under the policy, those of dropped responses estimated likewise, nats a "
    "token",
    "policy/logprob_psr": "mean log-probability of trained tokens of correct responses under the policy, nats a token",
    "policy/logprob_nsr": "mean log-probability of trained tokens of wrong responses under the policy, nats a token",
    "policy/kl_reference": "mean k3 estimate of the KL divergence from the policy to the initial one at response tokens, nats a token; "
    "with objective.kl_coefficient above 0, or every logging.kl_to_base_every steps",
    "policy/lambda": "weight of correct responses in the step, in w_reinforce",
    "policy/kept_ratio": "responses that the objective trains on, share of all sampled, 0 to 1",
    "policy/updates": "optimizer steps in the training step, count",
    "policy/learning_rate": "learning rate of the step's last update",
    "critic/loss": "value loss, mean over the step's mini-batches, squared reward",
    "critic/value_mean": "mean value of response tokens before the step's updates, reward",
    "critic/explained_variance": "share of the returns' variance that values before the step's updates explain: 1 all, 0 as a constant, "
    "below 0 worse than that",
    "critic/clip_ratio": "response tokens whose value loss is that of the clipped value, 0 to 1",
    "critic/grad_norm": "global gradient norm of the critic before clipping, mean over the step's mini-batches",
    "critic/learning_rate": "learning rate of the critic's updates in the step",
    "supervised/loss": "mean negative log-likelihood of reference responses, nats a token",
    "heldout/entropy": "mean entropy of the policy at rollout.temperature, at response tokens on held-out prompts, nats a token",
    "heldout/entropy_fixed": "mean entropy of the policy at rollout.temperature, at the tokens of the run's fixed responses, nats a token",
    "heldout/logprob_fixed": "mean log-probability of the tokens of the run's fixed responses under the policy, nats a token",
    "heldout/logprob_gap_mean": "as rollout/logprob_gap_mean, on held-out prompts and the weights that were evaluated, nats",
    "heldout/logprob_gap_max": "as rollout/logprob_gap_max, on held-out prompts and the weights that were evaluated, nats",
    "eval/<benchmark>/pass@<k>": "unbiased Pass@k, mean over the benchmark's problems, 0 to 1",
    "eval/<benchmark>/greedy_accuracy": "problems that the most probable response, token by token, solves, 0 to 1",
    "data/epoch": "complete passes over the training prompts, count",
    "time/step_s": "wall time of the step from sampling to the weight push, evaluation and checkpoint not included, seconds",
    "time/offload_s": "wall time of taking the policy's state out of device memory and back, and of the engine's sleep, seconds; what a "
    "push needs of it counts there",
    "time/rollout_s": "wall time of sampling, seconds",
    "time/reward_s": "wall time of grading that sampling did not hide, seconds",
    "time/old_logprobs_s": "wall time of the forward passes for old log-probabilities, seconds",
    "time/critic_s": "wall time of the critic: values, advantages and its updates, seconds",
    "time/update_s": "wall time of forward, backward and optimizer, seconds",
    "time/weight_sync_s": "wall time of pushing weights to the rollout engine, seconds",
    "time/eval_s": "wall time of evaluation, beside time/step_s, seconds",
    "time/checkpoint_s": "wall time of writing the step's checkpoint, beside time/step_s, seconds",
    "time/other_s": "what of time/step_s no other phase counts, seconds",
    "perf/tokens_per_s": "prompt and response tokens of all that the step sampled, by time/step_s, tokens a second",
}


# What may stand for a part in `<...>`.
PARTS = {"<benchmark>": "[^/]+", "<k>": "[1-9][0-9]*"}


def metric_meaning(name: str) -> str | None:
    """What a metric name says, `eval/MATH/pass@8` included; None for a name that the registry does not know."""
    if name in METRICS:
        return METRICS[name]
    return next((meaning for pattern, meaning in METRICS.items() if "<" in pattern and re.fullmatch(_expression(pattern), name)), None)


def _expression(pattern: str) -> str:
    """A registered name as a regular expression."""
    return "".join(PARTS.get(part, re.escape(part)) for part in re.split("(<[^>]*>)", pattern))


def encode_line(metrics: StepMetrics) -> str:
    """One line of metrics.jsonl, newline included; what is not finite becomes null, so that every line is strict JSON."""
    values = {name: float(value) for name, value in metrics.values.items()}
    record: dict[str, Any] = {"step": metrics.step}
    record |= {name: value if math.isfinite(value) else None for name, value in values.items()}
    return json.dumps(record, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl in order; a torn last line, as a kill leaves it, is left out.

    Raises UserError naming the line where an earlier one is not an object with a step.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    records = []
    for number, line in enumerate(lines, start=1):
        record = _decode(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            raise UserError(f"{path} line {number}: not a JSON object with a step")
    return records


def last_step(path: Path) -> int:
    """The step of the last line; 0 where there is none."""
    records = read_metrics(path)
    return int(records[-1]["step"]) if records else 0


def steps_by(path: Path, name: str) -> list[int]:
    """The steps that logged a finite value of the metric, the highest value first, and the earlier step of equal ones."""
    found = {int(record["step"]): float(record[name]) for record in read_metrics(path) if record.get(name) is not None}
    return sorted(found, key=lambda step: (-found[step], step))


def truncate_after(path: Path, step: int) -> None:
    """Drops the lines of later steps and a torn last line, so that a resumed run continues after `step`."""
    if path.is_file():
        write_atomic(path, "".join(json.dumps(record) + "\n" for record in read_metrics(path) if record["step"] <= step))


def _decode(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
