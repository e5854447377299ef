"""Converts between Hugging Face directories and checkpoints. May import: megatron_nsr, typer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from megatron_nsr.config import ParallelConfig
from megatron_nsr.conversion.command import exit_with
from megatron_nsr.conversion.exporting import export_hf
from megatron_nsr.conversion.importing import import_hf
from megatron_nsr.platform import distributed
from megatron_nsr.platform.model_files import has_tokenizer
from megatron_nsr.types import UserError

UNITS = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
Ranks = Annotated[int, typer.Option(min=1)]

HELP = """Converts between Hugging Face directories and checkpoints.

Exit status: 0 done; 1 not written (a full disk); 2 wrong input.

Over N processes: torchrun --nproc-per-node N tools/convert_checkpoint.py ...
"""

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=HELP)


@app.command("import")
def import_(
    hf_dir: Annotated[Path, typer.Argument(help="config.json, safetensors files, tokenizer")],
    out: Annotated[Path, typer.Argument(help="the checkpoint; training reads it as model.path")],
    tensor: Ranks = 1,
    pipeline: Ranks = 1,
    virtual: Annotated[int, typer.Option(min=1, help="model chunks a pipeline stage")] = 1,
    expert: Annotated[int, typer.Option(min=1, help="ranks that a layer's experts are spread over")] = 1,
) -> None:
    """Hugging Face to a checkpoint, in the pieces that ranks of the layout load; any other layout loads it too."""

    def work() -> int:
        if virtual > 1 and pipeline == 1:
            raise UserError(f"--virtual={virtual} needs --pipeline of 2 or more, not 1")
        import_hf(hf_dir, out, ParallelConfig(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, expert=expert))
        if distributed.launched_rank() == 0 and not has_tokenizer(out):
            print(f"{out}: weights without a tokenizer, as {hf_dir} has none; put one there before it stands as model.path")
        return 0

    exit_with(work)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="what `import` made, or RUN/checkpoints/step_N")],
    out_hf: Annotated[Path, typer.Argument(help="the Hugging Face directory")],
    shard_size: Annotated[str, typer.Option(help="bytes of a safetensors file, such as 500MB or 1GiB")] = "4GiB",
) -> None:
    """A checkpoint of any layout to Hugging Face."""

    def work() -> int:
        export_hf(checkpoint, out_hf, bytes_of(shard_size))
        return 0

    exit_with(work)


def bytes_of(size: str) -> int:
    """A number of bytes from a number and a unit. Raises UserError for anything else."""
    match = re.fullmatch(r"(\d+)\s*([a-z]*)", size.strip(), re.IGNORECASE)
    if match is None or match[2].upper() not in UNITS or int(match[1]) == 0:
        raise UserError(f"--shard-size={size}: give a number with one of KB, MB, GB, KiB, MiB, GiB, such as 1GiB")
    return int(match[1]) * UNITS[match[2].upper()]


if __name__ == "__main__":
    app()
