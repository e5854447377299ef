"""Drives one real VllmEngine through the cases of test_vllm_engine.py and writes what it saw as JSON.

A program of its own because an engine changes its process and takes seconds to start. Usage: program OUT_DIR
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from megatron_nsr.rollout.engine import Completion, SampleRequest, Sampling
from megatron_nsr.rollout.held_weights import wrong_tensors
from megatron_nsr.rollout.vllm_engine import VllmEngine
from megatron_nsr.rollout.vllm_options import QUANTIZATIONS
from megatron_nsr.weights.fp8_rows import is_rounded, largest_of_rows, rounded_rows
from tests.checksums import whole_checksums

VOCABULARY, MAX_MODEL_LEN = 160, 192
NO_STOP = Sampling(temperature=1.0, max_tokens=12, stop_ids=())


def random_model(seed: int) -> PreTrainedModel:
    """A tied Qwen3 whose weights are large enough for distributions far from uniform."""
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, max_position_embeddings=256, rope_theta=10000.0, tie_word_embeddings=True, eos_token_id=7, pad_token_id=0,
        bos_token_id=None, initializer_range=0.25, architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return model


def tensors(model: PreTrainedModel, leave_out: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, parameter.detach()) for name, parameter in model.named_parameters() if name != leave_out)


def requests(count: int = 6, length: int = 9, n: int = 1) -> list[SampleRequest]:
    draw = random.Random(length)
    return [SampleRequest(tuple(draw.randrange(8, VOCABULARY) for _ in range(length)), seed=2**62 + 1000 * i, n=n) for i in range(count)]


def largest_gap(model: PreTrainedModel, asked: list[SampleRequest], got: list[Completion], temperature: float = 1.0) -> float:
    """The largest |engine - HF| log-prob over all sampled tokens (requests with n = 1)."""
    gaps = []
    for request, completion in zip(asked, got, strict=True):
        ids = torch.tensor([*request.prompt_ids, *completion.token_ids.tolist()])
        with torch.no_grad():
            logits = model(ids[None, :-1]).logits[0, len(request.prompt_ids) - 1 :]
        expected = (logits / temperature).log_softmax(-1).gather(1, ids[len(request.prompt_ids) :, None])[:, 0]
        gaps.append(float((expected - torch.from_numpy(completion.logprobs)).abs().max()))
    return max(gaps)


def ids(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids.tolist() for completion in completions]


def message(call: Callable[[], Any]) -> str:
    """`ErrorType: message` of what the call raises, or "nothing"."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def weights_cases(engine: VllmEngine, old: PreTrainedModel, new: PreTrainedModel) -> dict[str, Any]:
    """Pushes: none, an incomplete one, two models, and the prefix cache in between."""
    short, long = requests(), requests(count=3, length=150)
    seen: dict[str, Any] = {"no_weights": message(lambda: engine.generate(short, NO_STOP)), "version_before": engine.version}
    engine.load_weights(tensors(old), 0)
    seen["gap_first"] = largest_gap(old, short, engine.generate(short, NO_STOP))
    first_long = engine.generate(long, NO_STOP)
    seen["gap_long_first"] = largest_gap(old, long, first_long)
    seen["gap_long_cached"] = largest_gap(old, long, engine.generate(long, NO_STOP))

    rest = tensors(old, leave_out="model.layers.1.self_attn.k_proj.weight")
    seen["incomplete"] = message(lambda: engine.load_weights(rest, 1))
    seen["incomplete_left"] = len(list(rest))
    seen["after_incomplete"] = message(lambda: engine.generate(short, NO_STOP))
    stray = iter([("model.layers.9.mlp.up_proj.weight", torch.ones(2, 2)), *tensors(old)])
    seen["unknown"] = message(lambda: engine.load_weights(stray, 1))
    padded = iter([(name, torch.cat([w, w]) if "embed" in name else w) for name, w in tensors(old)])
    seen["padded"] = message(lambda: engine.load_weights(padded, 1))
    seen["padded_left"] = len(list(padded))

    seen["pushed_bytes"] = engine.load_weights(tensors(new), 2)
    seen["model_bytes"] = sum(tensor.nbytes for _, tensor in tensors(new))
    seen["version"] = engine.version
    seen["gap_new"] = largest_gap(new, short, engine.generate(short, NO_STOP))
    seen["gap_long_new"] = largest_gap(new, long, engine.generate(long, NO_STOP))
    seen["models_differ"] = largest_gap(new, long, first_long)
    return seen


def sleep_cases(engine: VllmEngine, new: PreTrainedModel) -> dict[str, Any]:
    """A training phase's calls, in a step's order. On a CPU no memory is given back; vLLM's scheduler pauses and goes on all the same."""
    asked = requests()
    awake = ids(engine.generate(asked, NO_STOP))
    seen: dict[str, Any] = {}
    for level in (1, 2):
        engine.sleep(level)
        seen[f"version_asleep_{level}"] = engine.version
        engine.wake("weights")
        engine.load_weights(tensors(new), 2)
        engine.wake("kv_cache")
        seen[f"same_after_{level}"] = ids(engine.generate(asked, NO_STOP)) == awake
    return seen


def verification_cases(engine: VllmEngine, model: PreTrainedModel) -> dict[str, Any]:
    """Which tensors are found wrong: after a right push, after each of several wrong ones, and where a layer goes on with old weights."""
    expected = whole_checksums(tensors(model), torch.float32)

    def wrong() -> list[str]:
        return wrong_tensors(expected, engine.held_checksums())

    def spoiled(name: str, spoil: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        return ((other, spoil(tensor.clone()) if other == name else tensor) for other, tensor in tensors(model))

    engine.load_weights(tensors(model), 3)
    seen: dict[str, Any] = {"right": wrong(), "spoiled": {}}
    for name in SPOILED:
        engine.load_weights(spoiled(name, one_bit), 4)
        seen["spoiled"][name] = wrong()
    engine.load_weights(spoiled(SPOILED[0], lambda tensor: tensor.roll(1, 0)), 5)
    seen["rolled"] = wrong()

    engine.load_weights(((name, tensor + 1) for name, tensor in tensors(model)), 6)
    engine._llm.apply_model(keep_packed)
    engine.load_weights(tensors(model), 7)
    seen["before_stale"] = wrong()
    engine._llm.apply_model(use_kept)
    seen["stale"] = wrong()
    engine.load_weights(tensors(model), 8)
    seen["recovered"] = wrong()
    return seen


SPOILED = (
    "model.layers.1.self_attn.k_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.0.self_attn.q_norm.weight",
    "model.embed_tokens.weight",
)
KEPT: dict[str, Any] = {}


def one_bit(tensor: torch.Tensor) -> torch.Tensor:
    """The last element's lowest bit flipped."""
    tensor.view(torch.int32).view(-1)[-1] ^= 1
    return tensor


def keep_packed(model: torch.nn.Module) -> None:
    KEPT["layer"] = dict(model.named_modules())["model.layers.0.mlp.down_proj"]
    KEPT["cpu_linear"] = KEPT["layer"].cpu_linear


def use_kept(_: torch.nn.Module) -> None:
    KEPT["layer"].cpu_linear = KEPT["cpu_linear"]


def sampling_cases(engine: VllmEngine, model: PreTrainedModel) -> dict[str, Any]:
    """Temperature, stop ids, finish reasons and seeds."""
    asked = requests(count=8)
    plain = engine.generate(asked, NO_STOP)
    tempered = engine.generate(asked, Sampling(temperature=0.7, max_tokens=12, stop_ids=()))
    seen: dict[str, Any] = {
        "gap_tempered": largest_gap(model, asked, tempered, 0.7),
        "gap_tempered_raw": largest_gap(model, asked, tempered, 1.0),
        "plain": ids(plain),
        "again": ids(engine.generate(asked, NO_STOP)),
        "halves": ids(engine.generate(asked[4:], NO_STOP) + engine.generate(asked[:4], NO_STOP)),
        "dtypes": [str(plain[0].token_ids.dtype), str(plain[0].logprobs.dtype)],
        "plain_reasons": [completion.finish_reason for completion in plain],
    }
    grouped = engine.generate([SampleRequest(asked[0].prompt_ids, seed=50, n=3)], NO_STOP)
    single = [engine.generate([SampleRequest(asked[0].prompt_ids, seed=50 + i)], NO_STOP)[0] for i in range(3)]
    seen |= {"grouped": ids(grouped), "single": ids(single)}
    # every response's third and fifth id as the stop ids: the stop must come at the first of any of them
    stops = sorted({int(completion.token_ids[k]) for completion in plain[:2] for k in (2, 4)})
    stopped = engine.generate(asked, Sampling(temperature=1.0, max_tokens=12, stop_ids=tuple(stops)))
    seen |= {"stops": stops, "stopped": ids(stopped), "stopped_reasons": [completion.finish_reason for completion in stopped]}
    fills = engine.generate(requests(count=1, length=MAX_MODEL_LEN - 3), Sampling(temperature=1.0, max_tokens=100, stop_ids=()))
    seen["fills_model_len"] = [len(fills[0].token_ids), fills[0].finish_reason]
    seen["too_long"] = message(lambda: engine.generate(requests(count=1, length=MAX_MODEL_LEN), NO_STOP))
    many = engine.generate(requests(count=60, length=120, n=2), Sampling(temperature=1.0, max_tokens=2, stop_ids=()))
    seen["many_prompt_tokens"] = len(many)
    greedy = Sampling(temperature=0.0, max_tokens=6, stop_ids=())
    seen["greedy_same"] = ids(engine.generate([SampleRequest(asked[0].prompt_ids, seed=s) for s in (1, 2)], greedy))
    return seen


def fp8_cases(engine: VllmEngine, old: PreTrainedModel, new: PreTrainedModel) -> dict[str, Any]:
    """An engine that rounds linear layers to FP8: what it holds after right and wrong pushes, and how far its log-probs are from exact."""

    def wrong(model: PreTrainedModel) -> list[str]:
        rounded = ((n, rounded_rows(t, largest_of_rows(t))) for n, t in bfloat16_tensors(model) if is_rounded(n))
        kept = ((name, tensor) for name, tensor in bfloat16_tensors(model) if not is_rounded(name))
        expected = whole_checksums(rounded, torch.float32) | whole_checksums(kept, torch.bfloat16)
        return wrong_tensors(expected, engine.held_checksums())

    asked, seen = requests(), dict[str, Any]()
    for version, model in enumerate((old, new)):
        engine.load_weights(bfloat16_tensors(model), version)
        seen[f"fp8_right_{version}"] = wrong(model)
    completions = engine.generate(asked, NO_STOP)
    seen["fp8_gap"], seen["fp8_gap_of_other"] = (largest_gap(model, asked, completions) for model in (new, old))
    seen["fp8_other"] = wrong(old)
    engine.load_weights(((name, -tensor if name == SPOILED[0] else tensor) for name, tensor in bfloat16_tensors(new)), 3)
    seen["fp8_spoiled"] = wrong(new)
    engine.sleep(2)
    engine.wake("weights")
    engine.load_weights(bfloat16_tensors(new), 4)
    engine.wake("kv_cache")
    seen["fp8_after_sleep"] = wrong(new)
    seen["fp8_same"] = ids(engine.generate(asked, NO_STOP)) == ids(completions)
    engine._llm.apply_model(spoil_head)
    seen["fp8_spoiled_head"] = [wrong(new), ids(engine.generate(asked, NO_STOP)) == ids(completions)]
    return seen


def spoil_head(model: torch.nn.Module) -> None:
    """In place, where logits are formed from; whatever was packed from it stays right."""
    dict(model.named_modules())["lm_head"].weight.data.neg_()


def bfloat16_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, tensor.bfloat16()) for name, tensor in tensors(model))


def process_state() -> list[Any]:
    numpy_state: Any = np.random.get_state()
    state = torch.get_rng_state().numpy().tobytes().hex()
    return [state, numpy_state[1].tolist(), hash(random.getstate()), id(torch.set_num_threads)]


def main(out: Path) -> None:
    old, new = random_model(1), random_model(2)
    (out / "model").mkdir()
    old.config.save_pretrained(out / "model")
    (out / "model" / "generation_config.json").write_text(
        json.dumps({"temperature": 0.01, "top_k": 1, "max_new_tokens": 2, "eos_token_id": 7})
    )
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # as a trainer has it before its engine
    before = process_state()
    seen: dict[str, Any] = {}
    with VllmEngine(out / "model", dtype="float32", max_model_len=MAX_MODEL_LEN, max_num_seqs=64, kv_cache_mib=64) as engine:
        seen["start_left_state"] = process_state() == before
        seen |= weights_cases(engine, old, new)
        seen |= sleep_cases(engine, new)
        seen |= verification_cases(engine, new)
        seen |= sampling_cases(engine, new)
        seen["use_left_state"] = process_state() == before
    engine.close()  # a second time
    ones = torch.ones(2)
    dist.all_reduce(ones)
    options = {"dtype": "bfloat16", "quantization": QUANTIZATIONS["fp8"], "max_model_len": MAX_MODEL_LEN, "kv_cache_mib": 64}
    with VllmEngine(out / "model", **options) as engine:
        seen |= fp8_cases(engine, old, new)
    seen["group_after_close"] = ones.tolist()
    seen["after_close"] = message(lambda: engine.generate(requests(), NO_STOP))
    (out / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
