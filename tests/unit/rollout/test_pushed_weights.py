"""The check of a stream of pushed weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_nsr.rollout.pushed_weights import PushedWeights, checkpoint_names

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
NAMES = frozenset({"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"})


def stream(*names: str, rows: int = 4) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, torch.full((rows, 2), float(i))) for i, name in enumerate(names))


def test_fused_parameters_stand_for_their_parts() -> None:
    engine = ("layers.0.attn.qkv_proj.weight", "layers.0.attn.qkv_proj.bias", "layers.0.norm.weight")
    names = checkpoint_names(dict.fromkeys(engine, torch.zeros(2)), PACKED)
    parts = {f"layers.0.attn.{part}_proj.{kind}" for part in "qkv" for kind in ("weight", "bias")}
    assert names == parts | {"layers.0.norm.weight"}


def test_the_scales_of_an_engine_in_fp8_are_not_pushed() -> None:
    engine = ("layers.0.mlp.down_proj.weight", "layers.0.mlp.down_proj.weight_scale", "layers.1.mlp.experts.w2_weight_scale")
    assert checkpoint_names(dict.fromkeys(engine, torch.zeros(2)), PACKED) == {engine[0]}


@pytest.mark.parametrize("module", ["layers.0.mlp.experts.routed_experts", "layers.0.mlp.experts"])
def test_a_tensor_of_experts_stands_for_those_of_each(module: str) -> None:
    names = checkpoint_names({f"{module}.w13_weight": torch.zeros(3, 4, 2), f"{module}.w2_weight": torch.zeros(3, 2, 2)}, PACKED)
    assert names == {f"layers.0.mlp.experts.{i}.{part}_proj.weight" for i in range(3) for part in ("gate", "up", "down")}


def test_a_complete_push_passes_and_is_handed_on_in_order() -> None:
    pushed = PushedWeights(stream(*sorted(NAMES)), NAMES, vocabulary=4, copy_embedding=False)
    assert [name for name, _ in pushed] == sorted(NAMES)
    pushed.check()


def test_a_tied_embedding_is_handed_on_as_the_head_too() -> None:
    pushed = PushedWeights(stream("model.embed_tokens.weight", "model.norm.weight"), NAMES, vocabulary=4, copy_embedding=True)
    got = dict(pushed)
    pushed.check()
    assert got["lm_head.weight"] is got["model.embed_tokens.weight"]


def test_a_missing_tensor_is_named() -> None:
    pushed = PushedWeights(stream("model.embed_tokens.weight", "lm_head.weight"), NAMES, vocabulary=4, copy_embedding=False)
    pushed.drain()
    with pytest.raises(RuntimeError, match=r"lack 1 of 3 tensors: model\.norm\.weight"):
        pushed.check()


def test_an_unknown_tensor_is_named_and_withheld() -> None:
    pushed = PushedWeights(stream(*NAMES, "value_head.weight"), NAMES, vocabulary=4, copy_embedding=False)
    assert "value_head.weight" not in dict(pushed)
    with pytest.raises(RuntimeError, match=r"value_head\.weight is no weight of the model"):
        pushed.check()


def test_padding_rows_of_the_vocabulary_are_refused() -> None:
    pushed = PushedWeights(stream(*NAMES, rows=6), NAMES, vocabulary=4, copy_embedding=False)
    assert list(dict(pushed)) == ["model.norm.weight"]
    with pytest.raises(RuntimeError, match="has 6 rows, not vocab_size=4"):
        pushed.check()


def test_drain_consumes_what_the_engine_left_and_only_once() -> None:
    consumed: list[str] = []

    def counted() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in stream(*sorted(NAMES)):
            consumed.append(name)
            yield name, tensor

    pushed = PushedWeights(counted(), NAMES, vocabulary=4, copy_embedding=False)
    next(iter(pushed))
    pushed.drain()
    pushed.drain()
    assert consumed == sorted(NAMES)
    pushed.check()
