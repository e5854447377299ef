"""Measures import and export of a random checkpoint of Qwen2.5-1.5B's shape (3.1 GB) against cp and safetensors' own read and write.

Usage: python -m tools.benchmarks.conversion [--scratch DIR] [--repeats N] [--json FILE]. Needs 16 GB free in DIR; everything is removed.
Each job is a process of its own, start and imports included, one after another in turn. Wall and CPU seconds are the process's;
anonymous memory is the highest RssAnon of /proc/PID/status, looked at every 5 ms. Before each job, unmeasured, two copies of the model
are written, flushed and removed: a virtual machine's host gives memory that was never used much more slowly, and a job that follows one
whose files were removed would find more that was used.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from megatron_nsr.models.hf_config import read_model_shape
from megatron_nsr.weights.mapping import hf_names, hf_tensor_shape
from megatron_nsr.weights.safetensors_writing import TensorHeader, write_safetensors

TOOL = Path(__file__).parents[1] / "convert_checkpoint.py"
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "num_hidden_layers": 28,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
    "dtype": "bfloat16",
}
READ_AND_WRITE = """
import sys
from pathlib import Path
from safetensors.torch import load_file, save_file
for file in Path(sys.argv[1]).glob("*.safetensors"):
    save_file(load_file(file), Path(sys.argv[2]) / file.name)
"""
GOAL_TIME, GOAL_BYTES = 1.5, 2e9


def write_model(folder: Path) -> None:
    """Random bf16 weights in files of Hugging Face's usual size, which this model fits in one of."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shape = read_model_shape(str(folder))
    headers = [TensorHeader(name, "BF16", hf_tensor_shape(name, shape)) for name in hf_names(shape)]
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(header.shape, generator=generator).mul_(0.02).bfloat16() for header in headers)
    write_safetensors(folder / "model.safetensors", headers, values)


def measure(command: list[str], model: Path) -> dict[str, float]:
    """Runs a command to its end, after two copies of `model` were made and removed. Raises RuntimeError where it fails."""
    before = model.with_name("before")
    for name in ("one", "two"):
        shutil.copytree(model, before / name)
    os.sync()
    shutil.rmtree(before)
    start, anonymous = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        anonymous = max(anonymous, anonymous_bytes(process.pid))
        time.sleep(0.005)
    wall = time.perf_counter() - start
    assert process.stderr is not None
    if status:
        raise RuntimeError(f"{command[:4]}: {process.stderr.read().decode()[-2000:]}")
    return {"wall_s": round(wall, 2), "cpu_s": round(usage.ru_utime + usage.ru_stime, 2), "anonymous_bytes": anonymous}


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process, 0 where it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def one_round(model: Path, scratch: Path, shard_size: str, layout: list[str]) -> dict[str, dict[str, float]]:
    """The four jobs, in turn; export reads what import wrote."""
    copy, rewritten, checkpoint, exported = (scratch / name for name in ("copy", "rewritten", "checkpoint", "exported"))
    rewritten.mkdir()
    python = [sys.executable]
    found = {"cp": measure(["cp", "-r", str(model), str(copy)], model)}
    shutil.rmtree(copy)
    found["safetensors_read_and_write"] = measure([*python, "-c", READ_AND_WRITE, str(model), str(rewritten)], model)
    shutil.rmtree(rewritten)
    found["import"] = measure([*python, str(TOOL), "import", str(model), str(checkpoint), *layout], model)
    found["export"] = measure([*python, str(TOOL), "export", str(checkpoint), str(exported), "--shard-size", shard_size], model)
    shutil.rmtree(checkpoint)
    shutil.rmtree(exported)
    return found


def summary(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Medians over the rounds, and import and export over the sum of the other two."""
    jobs = {
        job: {what: sorted(found[job][what] for found in rounds)[len(rounds) // 2] for what in ("wall_s", "cpu_s", "anonymous_bytes")}
        for job in rounds[0]
    }
    ratios = {
        job: {
            what: round(jobs[job][what] / (jobs["cp"][what] + jobs["safetensors_read_and_write"][what]), 2) for what in ("wall_s", "cpu_s")
        }
        for job in ("import", "export")
    }
    peak = max(found[job]["anonymous_bytes"] for found in rounds for job in ("import", "export"))
    return {"median": jobs, "over_cp_plus_read_and_write": ratios, "peak_anonymous_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="a disk, not memory (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shard-size", default="1GiB")
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    if (free := shutil.disk_usage(options.scratch).free) < 16e9:
        raise SystemExit(f"--scratch={options.scratch}: {free / 1e9:.0f} GB free, 16 are needed")
    load = os.getloadavg()
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        scratch = Path(folder)
        write_model(scratch / "model")
        layout = ["--tensor", str(options.tensor), "--pipeline", str(options.pipeline)]
        rounds = [one_round(scratch / "model", scratch, options.shard_size, layout) for _ in range(options.repeats)]
        size = (scratch / "model" / "model.safetensors").stat().st_size
    results = {
        "bytes": size,
        "shard_size": options.shard_size,
        "layout": {"tensor": options.tensor, "pipeline": options.pipeline},
        "cores": os.cpu_count(),
        "load_before": [round(value, 2) for value in load],
        "load_after": [round(value, 2) for value in os.getloadavg()],
        "goal": {"over_cp_plus_read_and_write": GOAL_TIME, "peak_anonymous_bytes": GOAL_BYTES},
        **summary(rounds),
        "rounds": rounds,
    }
    text = json.dumps(results, indent=1)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
