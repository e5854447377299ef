"""Prints what a push of weights to the rollout engines moves, bucket by bucket and rank by rank; starts nothing.

Usage: python tools/push_plan.py CONFIG [key=value ...] --ranks N. May import: config, models, weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from megatron_nsr.config import Config
from megatron_nsr.config_files import load_config
from megatron_nsr.models.hf_config import read_model_shape
from megatron_nsr.models.parallel import validate_layout
from megatron_nsr.types import UserError
from megatron_nsr.weights.push_plan import MIB, PushPlan, plan_push

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
WIDTH = 132  # where the output is no terminal


def plan_of(config: Config, ranks: int) -> PushPlan:
    """The plan that a run of this config on `ranks` processes makes. Raises UserError where the layout does not fit."""
    shape, parallel = read_model_shape(config.model.path), config.parallel
    validate_layout(parallel, shape, ranks)
    return plan_push(
        shape,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        expert=parallel.expert,
        element_bytes=ELEMENT_BYTES[config.model.dtype],
        bucket_bytes=config.rollout.push_bucket_mib * MIB,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--ranks", type=int, required=True, help="processes of the run")
    options = parser.parse_intermixed_args(arguments)
    try:
        plan = plan_of(load_config(options.config, options.overrides), options.ranks)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    console.print(plan.describe(options.ranks))


if __name__ == "__main__":
    main()
