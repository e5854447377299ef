"""The log-prob gap of one engine in a process of its own: `python -m tools.acceptance.rollout_gap CONFIG OUT` writes it as JSON.

May import: everything. A second engine with other settings has no place in a process that has had one.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

from megatron_nsr.config import Config
from megatron_nsr.config_files import dump_config, load_config
from megatron_nsr.platform.quiet import ignore_library_warnings
from megatron_nsr.rollout.engine import Sampling
from tools.acceptance import processes
from tools.acceptance.record import Record
from tools.acceptance.runs import built, timed
from tools.acceptance.sampled import misaligned


def gap_of(record: Record, config: Config, work: Path) -> dict[str, float]:
    """What the program below finds for this config."""
    file, out = work / "gap.yaml", work / "gap.json"
    file.write_text(dump_config(config), encoding="utf-8")
    processes.run(processes.python("-m", "tools.acceptance.rollout_gap", file, out), work / "gap.log", record.remaining_s)
    found: dict[str, float] = json.loads(out.read_text(encoding="utf-8"))
    return found


def measure(config: Config) -> dict[str, float]:
    """Mean and largest gap in nats over three batches of prompts, tokens a second, and the mean that a shift by one token would show."""
    with built(config) as (inputs, parts):
        assert parts.rollouts is not None and inputs.train is not None
        parts.push(0)
        parts.phases.sample()
        rollout, prompts = config.rollout, inputs.train.prompts[: config.data.prompts_per_step]
        sampling = Sampling(rollout.temperature, rollout.max_response_tokens, inputs.tokenizer.stop_ids)
        generate = partial(parts.rollouts.generate, prompts, samples=rollout.samples_per_prompt, sampling=sampling, purpose="train")
        batches = [timed(partial(generate, step=step)) for step in range(3)]
        trajectories = [trajectory for _, batch in batches for trajectory in batch]
        parts.phases.inspect()
        found = parts.actor.measure_samples(trajectories)
    return {
        "mean": found["rollout/logprob_gap_mean"],
        "max": found["rollout/logprob_gap_max"],
        "tokens_per_s": max(sum(t.length for t in batch) / seconds for seconds, batch in batches),
        "misaligned": misaligned(trajectories),
    }


def main() -> None:
    ignore_library_warnings()
    found = measure(load_config(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
