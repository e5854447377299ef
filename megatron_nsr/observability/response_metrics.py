"""What a step's responses and verdicts say, as metrics: ratios, lengths, answers, and the two signs apart.

May import: types and numpy. A sign without a response has no entry. Nothing here touches a model: 8,192 responses take milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_nsr.types import Outcome, Reason, Trajectory, Verdict


def response_metrics(trajectories: Sequence[Trajectory], verdicts: Sequence[Verdict], samples_per_prompt: int) -> dict[str, float]:
    """Metrics of a step's responses, which are ordered by prompt and then by sample."""
    rewards = np.array([np.nan if verdict.reward is None else verdict.reward for verdict in verdicts])
    lengths = np.array([trajectory.length for trajectory in trajectories])
    truncated = np.array([trajectory.truncated for trajectory in trajectories])
    logprobs = np.array([trajectory.rollout_logprobs.sum(dtype=np.float64) for trajectory in trajectories])
    metrics = {
        **_ratios(rewards.reshape(-1, samples_per_prompt)),
        **_reasons(verdicts),
        **_answers(verdicts, samples_per_prompt),
        "reward/truncated_ratio": float(truncated.mean()),
        "rollout/response_tokens_mean": float(lengths.mean()),
        "rollout/response_tokens_max": float(lengths.max()),
        "rollout/weight_version": float(trajectories[0].weight_version),
    }
    for sign, chosen in (("psr", rewards > 0), ("nsr", rewards < 0)):
        if chosen.any():
            metrics[f"rollout/response_tokens_mean_{sign}"] = float(lengths[chosen].mean())
            metrics[f"rollout/logprob_{sign}"] = float(logprobs[chosen].sum() / lengths[chosen].sum())
    if (rewards < 0).any():
        metrics["reward/truncated_ratio_nsr"] = float(truncated[rewards < 0].mean())
    return metrics


def _ratios(rewards: np.ndarray) -> dict[str, float]:
    """rewards: [prompts, samples], NaN without a verdict. Over samples that have one, and over prompts; `no_verdict` is over all."""
    judged, correct, wrong = ~np.isnan(rewards), rewards > 0, rewards < 0
    metrics = {"reward/no_verdict_ratio": 1.0 - float(judged.mean())}
    if judged.any():
        metrics["reward/correct_ratio"] = float(correct.sum() / judged.sum())
        metrics["reward/fully_solved_ratio"] = float((correct.any(1) & ~wrong.any(1)).mean())
        metrics["reward/never_solved_ratio"] = float((wrong.any(1) & ~correct.any(1)).mean())
    return metrics


def _reasons(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Why there is no verdict, over all responses; what is missing in the sum are masked truncated ones."""
    missing = [verdict.reason for verdict in verdicts if verdict.outcome is Outcome.NONE]
    reasons = (Reason.TIMEOUT, Reason.CRASH, Reason.BAD_GOLD)
    return {f"reward/{reason.value}_ratio": missing.count(reason) / len(verdicts) for reason in reasons}


def _answers(verdicts: Sequence[Verdict], samples_per_prompt: int) -> dict[str, float]:
    """How many answers a prompt's responses give. By their text: `1/2` and `0.5` are two. Nothing where the grader tells none."""
    given = {(index // samples_per_prompt, verdict.answer) for index, verdict in enumerate(verdicts) if verdict.answer is not None}
    return {"reward/unique_answers_mean": len(given) * samples_per_prompt / len(verdicts)} if given else {}
