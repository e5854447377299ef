"""model.transformer: what it may set has its effect, and what would make policy and engine two models is refused with the reason."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_nsr.config import ParallelConfig
from megatron_nsr.config_files import dump_config, load_config
from megatron_nsr.models import policy
from megatron_nsr.models.backends import choose_backend
from megatron_nsr.models.hf_config import ModelShape, read_model_shape
from megatron_nsr.models.te_backend import TransformerEngineBackend
from megatron_nsr.models.transformer_fields import ALLOWED, REFUSED, SET_BY, checked_fields
from megatron_nsr.training.actor import Actor
from megatron_nsr.types import UserError
from tests.tiny_models import write_tiny_model
from tests.unit.training.test_actor import SAMPLES, actor_of, config_of, steps, weights


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_tiny_model(path, "qwen3_moe", tied=False, layers=2)
    return path


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense")
    write_tiny_model(path, "qwen3", tied=False, layers=2)
    return path


@pytest.fixture(scope="module")
def shape(model: Path) -> ModelShape:
    return read_model_shape(str(model))


def test_every_field_of_the_installed_megatron_core_is_judged_once() -> None:
    tables = [list(ALLOWED), *SET_BY.values(), *REFUSED.values()]
    judged = Counter(name for table in tables for name in table)
    assert {name: count for name, count in judged.items() if count > 1} == {}
    assert judged.keys() == {field.name for field in dataclasses.fields(TransformerConfig)}


def test_the_documentation_lists_what_may_be_set() -> None:
    page = (Path(__file__).parents[3] / "docs" / "training.md").read_text()
    listed = [f"| `{name}` | {meaning} |" for name, meaning in ALLOWED.items()]
    assert "\n".join(listed) in page


def test_what_this_project_sets_is_not_the_users_to_set(shape: ModelShape) -> None:
    parallel = ParallelConfig(tensor=2, sequence=True, pipeline=2, virtual_pipeline=2, expert=2)
    ours = policy._own_fields(shape, parallel, torch.bfloat16, choose_backend("cpu"))
    assert not ours.keys() & ALLOWED.keys() and len(ours) > 30
    assert not object.__new__(TransformerEngineBackend).config_overrides().keys() & ALLOWED.keys()
    with pytest.raises(UserError, match=r"model\.transformer\.tensor_model_parallel_size=2: parallel\.tensor sets it"):
        checked_fields({"tensor_model_parallel_size": 2}, backend="te", recompute="none")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout=0.1: it must not be set: log-probs would be random"),
        ({"softmax_scale": 0.5}, "softmax_scale=0.5: it must not be set: the policy would compute another model"),
        ({"fp8": "hybrid"}, "fp8='hybrid': model.fp8 sets it"),
        ({"first_last_layers_bf16": True}, "first_last_layers_bf16=True: model.fp8_edge_layers sets it"),
        ({"fp8_param": True}, "fp8_param=True: it must not be set: checkpoints, export and push expect weights that are not quantized"),
        ({"fp8_margin": 1}, "fp8_margin=1: it must not be set: what is computed in FP8 is the recipe's (model.fp8)"),
        ({"bf16": True}, "bf16=True: model.dtype sets it"),
        ({"grad_scale_func": "x"}, "grad_scale_func='x': the training loop sets it"),
        ({"num_layers": 2}, "num_layers=2: the model's config.json sets it"),
        ({"recompute_module": ["mlp"]}, "recompute_module=['mlp']: no such field; did you mean recompute_modules?"),
        ({"zzz": 1}, "zzz=1: no such field; what may be set: recompute_method, "),
        ({"recompute_num_layers": "2"}, "recompute_num_layers='2': input should be a valid integer"),
        ({"recompute_method": "blocks"}, "recompute_method='blocks': input should be 'uniform' or 'block'"),
        ({"attention_backend": "fast"}, "attention_backend='fast': give one of flash, fused, unfused, local, auto"),
    ],
)
def test_a_field_that_may_not_be_set_is_refused_with_the_reason(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as refused:
        checked_fields(given, backend="te", recompute="full")
    assert str(refused.value).startswith(f"model.transformer.{expected}")


def test_a_field_that_would_do_nothing_here_is_refused(shape: ModelShape) -> None:
    with pytest.raises(UserError, match="only the te backend reads it, and this is the cpu backend"):
        checked_fields({"moe_permute_fusion": True}, backend="cpu", recompute="none")
    with pytest.raises(UserError, match=r"it needs training\.recompute=selective, not full"):
        checked_fields({"recompute_modules": ["mlp"]}, backend="cpu", recompute="full")


def test_what_megatron_core_refuses_is_passed_on_in_one_line(shape: ModelShape) -> None:
    with pytest.raises(UserError, match=r"model\.transformer=\{'recompute_modules': \['mpl'\]\}: megatron-core refuses it: .*mpl"):
        policy.transformer_config(
            shape,
            ParallelConfig(),
            dtype=torch.float32,
            backend=choose_backend("cpu"),
            recompute="selective",
            fields={"recompute_modules": ["mpl"]},
        )


def mlp_passes(actor: Actor) -> list[int]:
    """Grows with each forward pass of an MLP, recomputed or not."""
    passes: list[int] = []
    for module in actor.chunks[0].modules():
        if isinstance(module, MLP):
            module.register_forward_hook(lambda *_: passes.append(1))
    return passes


def test_recomputed_modules_are_recomputed_and_change_no_number(dense: Path) -> None:
    found: dict[str, tuple[int, dict[str, float], dict[str, torch.Tensor]]] = {}
    for name, transformer in (("plain", {}), ("mlp", {"recompute_modules": ["mlp"]})):
        actor = actor_of(dense, recompute="selective", transformer=transformer)
        passes = mlp_passes(actor)
        metrics = steps(actor, SAMPLES)
        found[name] = (len(passes), metrics, weights(actor))
    plain, recomputed = found["plain"], found["mlp"]
    assert recomputed[0] == 2 * plain[0] > 0
    assert recomputed[1] == pytest.approx(plain[1], rel=1e-6)
    for name, tensor in plain[2].items():
        torch.testing.assert_close(recomputed[2][name], tensor, rtol=1e-5, atol=1e-7, msg=name)


def test_a_run_keeps_a_record_of_it(dense: Path, tmp_path: Path) -> None:
    config = config_of(dense, recompute="selective", transformer={"recompute_modules": ["core_attn", "mlp"]})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml").model.transformer == {"recompute_modules": ["core_attn", "mlp"]}
    overridden = load_config(tmp_path / "config.yaml", ["model.transformer.recompute_modules=[mlp]"])
    assert overridden.model.transformer == {"recompute_modules": ["mlp"]}
