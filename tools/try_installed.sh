#!/usr/bin/env bash
# An installed megatron_nsr at work, away from any checkout: doctor, the examples that came with it, and two training steps of
# the quickstart's base model and of NSR from it. Usage: tools/try_installed.sh ENVIRONMENT (a folder with bin/megatron-nsr)
set -euo pipefail
bin=$(cd "$1/bin" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
unset PYTHONPATH
export OMP_NUM_THREADS=1

"$bin/megatron-nsr" doctor
"$bin/megatron-nsr" examples --out .
"$bin/python" -c 'from pathlib import Path; from examples.quickstart.prepare import prepare; prepare(Path("runs/quickstart"), corpus_size=3000)'
small=(run.steps=2 evaluation.limit=4 evaluation.samples=2 logging.tensorboard=false)
"$bin/megatron-nsr" train configs/quickstart_base.yaml "${small[@]}" optimizer.warmup_steps=1
"$bin/megatron-nsr" train configs/quickstart.yaml "${small[@]}" objective.name=nsr
wc -l runs/quickstart/*/metrics.jsonl
