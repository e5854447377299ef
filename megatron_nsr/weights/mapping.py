"""The one table of which Hugging Face tensors make which megatron-core parameter, for loading, export and pushing.

May import: megatron.core through models, models, types. Layer numbers in names are global; `locate_layer` says where a layer lives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from megatron_nsr.models.hf_config import Family, ModelShape
from megatron_nsr.weights.layouts import ColumnSharded, FusedGateUp, FusedQKV, Layout, PaddedVocabulary, Replicated

if TYPE_CHECKING:
    from megatron_nsr.models.policy import PolicyModel


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter and the HF tensors it is made of; `{layer}` stands for a layer's number in all names.

    te_name: what the te backend calls the parameter, whose linear layers hold the norm in front of them; checkpoints of either
        backend use this name.
    tied_copy: the last stage's copy of a tied embedding: loaded from the embedding's tensor, never exported.
    """

    megatron: str
    hf: tuple[str, ...]
    layout: Layout
    te_name: str | None = None
    tied_copy: bool = False

    def of_layer(self, layer: int) -> tuple[str, ...]:
        """The HF names for one global layer."""
        return tuple(name.format(layer=layer) for name in self.hf)

    @property
    def checkpoint_key(self) -> str:
        """The parameter's name in a checkpoint, which holds all layers of a kind as one tensor, the layer being its first dimension."""
        return (self.te_name or self.megatron).replace("{layer}.", "")


_LAYER = "decoder.layers.{layer}."
_HF_LAYER = "model.layers.{layer}."

EMBEDDING = Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), PaddedVocabulary())
FINAL_NORM = Entry("decoder.final_layernorm.weight", ("model.norm.weight",), Replicated())
HEAD = Entry("output_layer.weight", ("lm_head.weight",), PaddedVocabulary())
TIED_HEAD = Entry("output_layer.weight", EMBEDDING.hf, PaddedVocabulary(), tied_copy=True)

_QKV_BIAS = Entry(_LAYER + "self_attention.linear_qkv.bias", tuple(f"{_HF_LAYER}self_attn.{x}_proj.bias" for x in "qkv"), FusedQKV())
_QK_NORMS = tuple(
    Entry(f"{_LAYER}self_attention.{x}_layernorm.weight", (f"{_HF_LAYER}self_attn.{x}_norm.weight",), Replicated()) for x in "qk"
)
_COMMON = (
    Entry(
        _LAYER + "input_layernorm.weight",
        (_HF_LAYER + "input_layernorm.weight",),
        Replicated(),
        te_name=_LAYER + "self_attention.linear_qkv.layer_norm_weight",
    ),
    Entry(_LAYER + "self_attention.linear_qkv.weight", tuple(f"{_HF_LAYER}self_attn.{x}_proj.weight" for x in "qkv"), FusedQKV()),
    Entry(_LAYER + "self_attention.linear_proj.weight", (_HF_LAYER + "self_attn.o_proj.weight",), ColumnSharded()),
    Entry(
        _LAYER + "pre_mlp_layernorm.weight",
        (_HF_LAYER + "post_attention_layernorm.weight",),
        Replicated(),
        te_name=_LAYER + "mlp.linear_fc1.layer_norm_weight",
    ),
    Entry(_LAYER + "mlp.linear_fc1.weight", tuple(f"{_HF_LAYER}mlp.{x}_proj.weight" for x in ("gate", "up")), FusedGateUp()),
    Entry(_LAYER + "mlp.linear_fc2.weight", (_HF_LAYER + "mlp.down_proj.weight",), ColumnSharded()),
)

LAYER_ENTRIES: Mapping[Family, tuple[Entry, ...]] = {
    "qwen2": (*_COMMON, _QKV_BIAS),
    "qwen3": (*_COMMON, *_QK_NORMS),
    "llama": _COMMON,
}


def whole_model_entries(shape: ModelShape) -> Iterator[tuple[int | None, Entry]]:
    """(global layer or None, entry with the HF names filled in) in the order of export; every HF tensor once, tied copies left out."""
    yield None, EMBEDDING
    for layer in range(shape.num_layers):
        for entry in LAYER_ENTRIES[shape.family]:
            yield layer, replace(entry, hf=entry.of_layer(layer))
    yield None, FINAL_NORM
    if not shape.tie_embeddings:
        yield None, HEAD


def hf_names(shape: ModelShape) -> list[str]:
    """Every HF tensor of the model, in the order of export."""
    return [name for _, entry in whole_model_entries(shape) for name in entry.hf]


def hf_tensor_shape(name: str, shape: ModelShape) -> tuple[int, ...]:
    """The whole tensor's dimensions on disk."""
    queries, keys = shape.heads * shape.head_dim, shape.query_groups * shape.head_dim
    vocabulary = (shape.vocab_size, shape.hidden)
    dimensions: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": vocabulary,
        "lm_head": vocabulary,
        "self_attn.q_proj": (queries, shape.hidden),
        "self_attn.k_proj": (keys, shape.hidden),
        "self_attn.v_proj": (keys, shape.hidden),
        "self_attn.o_proj": (shape.hidden, queries),
        "self_attn.q_norm": (shape.head_dim,),
        "self_attn.k_norm": (shape.head_dim,),
        "mlp.gate_proj": (shape.ffn, shape.hidden),
        "mlp.up_proj": (shape.ffn, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.ffn),
    }
    module, _, kind = name.rpartition(".")
    found = next((size for suffix, size in dimensions.items() if module.endswith(suffix)), (shape.hidden,))  # else a norm
    return found[:1] if kind == "bias" else found


@dataclass(frozen=True, slots=True)
class Location:
    """Where a layer lives: the pipeline rank, the virtual stage there, and the layer's number inside that chunk."""

    pipeline_rank: int
    vp_stage: int
    index: int


def locate_layer(layer: int, num_layers: int, pipeline: int, virtual_pipeline: int) -> Location:
    """The only translation between global and local layer numbers: chunks of equal size go round the pipeline ranks."""
    per_chunk = num_layers // (pipeline * virtual_pipeline)
    chunk, index = divmod(layer, per_chunk)
    return Location(chunk % pipeline, chunk // pipeline, index)


def locate(layer: int | None, entry: Entry, num_layers: int, pipeline: int, virtual_pipeline: int) -> Location:
    """Where an entry's parameter lives; the embedding is on the first stage, the final norm and the head on the last."""
    if layer is not None:
        return locate_layer(layer, num_layers, pipeline, virtual_pipeline)
    return Location(0, 0, 0) if entry is EMBEDDING else Location(pipeline - 1, virtual_pipeline - 1, 0)


def local_parameter(entry: Entry, index: int, parameters: Mapping[str, Tensor]) -> tuple[str, Tensor]:
    """The chunk's (name, parameter) of an entry, under either backend's name. Raises RuntimeError where there is none."""
    names = [name.format(layer=index) for name in (entry.megatron, entry.te_name) if name is not None]
    for name in names:
        if name in parameters:
            return name, parameters[name]
    raise RuntimeError(f"the model has no parameter {' or '.join(names)} for {', '.join(entry.hf)}")


def chunk_entries(chunks: Sequence[PolicyModel], shape: ModelShape) -> Iterator[tuple[int, Entry, str, Tensor]]:
    """(chunk number, entry with HF names filled in, local name, parameter) of everything on this rank, tied copies included."""
    config = chunks[0].config
    pipeline, rank = chunks[0].pg_collection.pp.size(), chunks[0].pg_collection.pp.rank()
    parameters = [dict(chunk.named_parameters()) for chunk in chunks]
    for layer, entry in whole_model_entries(shape):
        where = locate(layer, entry, config.num_layers, pipeline, len(chunks))
        if where.pipeline_rank == rank:
            yield where.vp_stage, entry, *local_parameter(entry, where.index, parameters[where.vp_stage])
    if shape.tie_embeddings and TIED_HEAD.megatron in parameters[-1]:
        yield len(chunks) - 1, TIED_HEAD, TIED_HEAD.megatron, parameters[-1][TIED_HEAD.megatron]
