"""Compares a checkpoint with a Hugging Face directory tensor by tensor. Exit status: 0 equal; 1 different; 2 wrong input.

May import: megatron_nsr, typer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_nsr.conversion.command import exit_with
from megatron_nsr.conversion.verifying import differences


def verify(
    checkpoint: Annotated[Path, typer.Argument(help="what `import` made, or RUN/checkpoints/step_N")],
    hf_dir: Annotated[Path, typer.Argument(help="what it should be equal to")],
    logits: Annotated[bool, typer.Option("--logits", help="run both models as well (in fp32, one after the other)")] = False,
) -> None:
    """Compares a checkpoint with a Hugging Face directory: every tensor's bits and, with --logits, a forward pass."""

    def work() -> int:
        found = differences(checkpoint, hf_dir)
        for line in found:
            print(line)
        different = bool(found)
        if logits:
            from megatron_nsr.conversion.logits import TOLERANCE, logit_error

            error = logit_error(checkpoint, hf_dir)
            print(f"logits differ by {error:.2g} of the largest; up to {TOLERANCE:.0e} is rounding")
            different |= not error <= TOLERANCE
        print(f"{checkpoint} and {hf_dir}: {'different' if different else 'equal'}")
        return int(different)

    exit_with(work)


if __name__ == "__main__":
    typer.run(verify)
