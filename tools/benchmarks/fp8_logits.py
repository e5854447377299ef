"""How far log-probs move when the head's logits come from FP8 (e4m3) sides: `OMP_NUM_THREADS=1 python -m tools.benchmarks.fp8_logits`.

Random hidden states and weights, bf16, against float64; targets are sampled from the model. e4m3 is rounded the same on every device,
so a CPU shows the error, and nothing about speed.
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table

from megatron_nsr.losses.policy_head import HeadInputs, HeadOptions, policy_head
from megatron_nsr.losses.shard import VocabularyShard
from megatron_nsr.losses.terms import LossTerms

TOKENS, HIDDEN, VOCABULARY = 256, 3584, 16384
SPREADS = (1.0, 2.0, 4.0)


def errors(spread: float, *, fp8: bool) -> torch.Tensor:
    """Log-prob errors [tokens], nats, where logits have a standard deviation of `spread`."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16()
    weight = (torch.randn(VOCABULARY, HIDDEN, generator=generator) * spread / HIDDEN**0.5).bfloat16()
    exact = torch.log_softmax(hidden.double() @ weight.double().t(), -1)
    targets = torch.multinomial(exact.exp(), 1, generator=generator)
    shard, options = VocabularyShard(0, VOCABULARY), HeadOptions(fp8=fp8)
    outputs = policy_head(hidden, weight, HeadInputs(targets[:, 0]), shard, LossTerms(), options)
    return outputs.logprobs.double() - exact.gather(1, targets)[:, 0]


def main() -> None:
    table = Table(title=f"log-prob error, nats: {TOKENS} tokens, hidden {HIDDEN}, vocabulary {VOCABULARY}, bf16 inputs")
    for column in ("spread of logits", "logits' product", "mean |error|", "largest", "mean"):
        table.add_column(column, justify="right")
    for spread in SPREADS:
        for fp8 in (False, True):
            error = errors(spread, fp8=fp8)
            cells = (f"{value:.1e}" for value in (error.abs().mean(), error.abs().max(), error.mean()))
            table.add_row(f"{spread:g}", "fp8" if fp8 else "bf16", *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
