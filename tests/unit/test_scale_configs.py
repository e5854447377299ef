"""configs/scale: layouts that these models and this many GPUs allow, and no difference from the common file without a reason beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_nsr.config import Config
from megatron_nsr.config_files import load_config
from megatron_nsr.models.hf_config import ModelShape, read_model_shape
from megatron_nsr.models.parallel import validate_layout
from megatron_nsr.observability.run_directory import flat_config
from megatron_nsr.rollout.vllm_engine import check_tensor_parallel

FOLDER = Path(__file__).parents[2] / "configs" / "scale"
FILES = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "common")
NODES = {
    "qwen2.5_7b_1x8": 1,
    "qwen2.5_32b_4x8": 4,
    "qwen2.5_72b_8x8": 8,
    "qwen2.5_72b_128x8": 128,
    "qwen3_30b_a3b_2x8": 2,
    "qwen3_235b_a22b_16x8": 16,
    "llama3.1_405b_64x8": 64,
}
NAMES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
POSITIONS = "max_position_embeddings"


def dense(family: str, *sizes: int, positions: int) -> dict[str, Any]:
    return {"model_type": family, **dict(zip(NAMES, sizes, strict=True)), POSITIONS: positions}


def experts(*sizes: int, ffn: int) -> dict[str, Any]:
    mixture = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": ffn, "norm_topk_prob": True, "head_dim": 128}
    return dense("qwen3_moe", *sizes, positions=40960) | mixture


# The sizes in the config.json that each model is published with.
MODELS: dict[str, dict[str, Any]] = {
    "Qwen2.5-7B": dense("qwen2", 28, 3584, 18944, 28, 4, 152064, positions=131072),
    "Qwen2.5-32B": dense("qwen2", 64, 5120, 27648, 40, 8, 152064, positions=131072),
    "Qwen2.5-72B": dense("qwen2", 80, 8192, 29568, 64, 8, 152064, positions=131072),
    "Qwen3-30B-A3B": experts(48, 2048, 6144, 32, 4, 151936, ffn=768),
    "Qwen3-235B-A22B": experts(94, 4096, 12288, 64, 4, 151936, ffn=1536),
    "Llama-3.1-405B-Instruct": dense("llama", 126, 16384, 53248, 128, 8, 128256, positions=131072),
}
# What belongs to a model and its layout; the objective, the data and the optimizer are everywhere the same.
MAY_DIFFER = re.compile(
    r"run\.dir|model\.path|data\.template|parallel\.(tensor|sequence|pipeline|virtual_pipeline|expert)"
    r"|rollout\.(tensor_parallel|max_num_seqs|gpu_memory_utilization|sleep_level)|training\.(recompute|offload|tokens_per_micro_batch)"
)
# And what else a single file is there for.
ALSO = {
    "qwen3_30b_a3b_2x8": {"objective.router_aux_loss"},
    "qwen3_235b_a22b_16x8": {"objective.router_aux_loss"},
    "llama3.1_405b_64x8": {"rollout.mode", "rollout.servers", "rollout.max_staleness", "objective.rollout_correction"},
    "qwen2.5_72b_128x8": {"data.prompts_per_step", "objective.mini_batch_prompts"},
}


def load(name: str) -> Config:
    return load_config(FOLDER / f"{name}.yaml")


def shape_of(config: Config, folder: Path) -> ModelShape:
    (folder / "config.json").write_text(json.dumps(MODELS[Path(config.model.path).name]))
    return read_model_shape(str(folder))


def trainer_gpus(name: str, config: Config) -> int:
    return 8 * NODES[name] - len(config.rollout.servers) * config.rollout.tensor_parallel


def written(name: str) -> dict[str, str]:
    """Dotted key: its comment, of each key with a value that the file itself has."""
    found, section = {}, ""
    for line in (FOLDER / f"{name}.yaml").read_text().splitlines():
        if match := re.fullmatch(r"(\w+):", line):
            section = match[1]
        elif match := re.fullmatch(r"  (\w+):[^#]*(?:# (.*))?", line):
            found[f"{section}.{match[1]}"] = match[2] or ""
    return found


def test_every_scale_has_its_file_and_every_file_is_a_scale() -> None:
    assert set(FILES) == NODES.keys()
    assert all(name.endswith(f"_{nodes}x8") for name, nodes in NODES.items())


@pytest.mark.parametrize("name", FILES)
def test_the_layout_is_one_of_this_model_on_this_many_gpus(name: str, tmp_path: Path) -> None:
    config = load(name)
    shape, gpus = shape_of(config, tmp_path), trainer_gpus(name, config)
    assert gpus > 0 and gpus % 8 == 0
    validate_layout(config.parallel, shape, gpus)
    check_tensor_parallel(config.rollout.tensor_parallel, world_size=gpus, attention_heads=shape.heads)
    assert config.parallel.tensor <= 8 and config.rollout.tensor_parallel <= 8  # on NVLink
    assert config.data.max_prompt_tokens + config.rollout.max_response_tokens <= shape.max_positions
    stages = config.parallel.tensor * config.parallel.pipeline
    assert config.parallel.distributed_optimizer and gpus // stages > 1


@pytest.mark.parametrize("name", FILES)
def test_the_first_line_says_the_layout_that_the_file_has(name: str) -> None:
    config, parallel = load(name), load(name).parallel
    data = trainer_gpus(name, config) // (parallel.tensor * parallel.pipeline)
    sizes = f"TP {parallel.tensor} x PP {parallel.pipeline} x VPP {parallel.virtual_pipeline} x CP 1 x EP {parallel.expert} x DP {data}"
    head = (FOLDER / f"{name}.yaml").read_text().partition("include:")[0]
    assert sizes in head and Path(config.model.path).name.removesuffix("-Instruct") in head


@pytest.mark.parametrize("name", FILES)
def test_a_file_differs_from_the_common_one_only_where_it_says_so(name: str) -> None:
    lines = written(name)
    assert [key for key, comment in lines.items() if not comment] == []
    common = flat_config(load_config(FOLDER / "common.yaml", ["run.dir=x", "model.path=x", "data.template=plain"]))
    below = "qwen2.5_72b_8x8" if name == "qwen2.5_72b_128x8" else None
    said = lines.keys() | (written(below).keys() if below else set())
    changed = {key for key, value in flat_config(load(name)).items() if value != common.get(key)}
    assert changed <= said
    assert {key for key in changed if not MAY_DIFFER.fullmatch(key)} == ALSO.get(name, set())


@pytest.mark.parametrize("name", FILES)
def test_only_an_engine_that_shares_its_gpus_makes_room(name: str) -> None:
    config = load(name)
    shared = config.rollout.mode == "colocated"
    assert (config.training.offload != "none") == (config.rollout.sleep_level > 0) == shared
