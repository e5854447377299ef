"""What a policy computes on its backend before and after updates, written to files: two backends are compared through them.

Usage: python -m tools.acceptance.backend_numbers CASES.json, a list of cases. May import: everything but vLLM.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_nsr.training.checkpoints import Checkpoints
from megatron_nsr.weights.checksums import policy_checksums
from megatron_nsr.weights.gathering import plan_for
from tools.acceptance.policies import build_policy_of, made_up, packed, policy_config, response_logprobs, update_on

LEARNING_RATE = 1e-3
PROMPT, RESPONSES = 6, (40, 17, 3, 60)
Numbers = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """load: a checkpoint after the first update, which is then left out. save: where one is written after it. out: for the numbers.

    forget: a known fault, for float32: the optimizer's moments are lost between the two updates.
    """

    model: str
    dtype: str
    out: str
    load: str | None = None
    save: str | None = None
    forget: bool = False


def measure(case: Case) -> Numbers:
    """log-probs [response tokens] before, after one and after two updates; loss and gradient norm of the second; checksums after one."""
    model = Path(case.model)
    actor, shape = build_policy_of(policy_config(model, model={"dtype": case.dtype, "initialization": "random"}))
    batch = packed(made_up(shape.vocab_size, PROMPT, RESPONSES, seed=2), actor)
    found: Numbers = {"before": response_logprobs(actor, batch)}
    if case.load:
        Checkpoints(Path(case.load).parent, keep=1).load(Path(case.load), actor.wrapped, actor.optimizer, actor.backend)
    else:
        update_on(actor, [batch], LEARNING_RATE)
    found["after_one"] = response_logprobs(actor, batch)
    plan = plan_for(actor.chunks, shape, 1 << 30)
    found["checksums"] = policy_checksums(plan, actor.chunks, next(actor.chunks[0].parameters()).dtype)
    if case.save:
        state = {"sampler": {}, "weight_version": 1, "metrics": {}}
        folder = Path(case.save)
        Checkpoints(folder.parent, keep=1).save(1, state, actor.wrapped, actor.optimizer, actor.backend, model)
    if case.forget:
        for part in actor.optimizer.chained_optimizers:
            part.optimizer.state.clear()
    metrics = update_on(actor, [batch], LEARNING_RATE)
    found |= {name: metrics[f"policy/{name}"] for name in ("loss", "grad_norm")}
    found["after_two"] = response_logprobs(actor, batch)
    torch.save(found, case.out)
    return found


def write_cases(file: Path, cases: list[Case]) -> Path:
    file.write_text(json.dumps([asdict(case) for case in cases]), encoding="utf-8")
    return file


def main() -> None:
    for case in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        measure(Case(**case))


if __name__ == "__main__":
    main()
