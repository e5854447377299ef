"""The one table of which Hugging Face tensors make which megatron-core parameter, for loading, export and pushing.

May import: megatron.core through models, models, types. Layer and expert numbers in HF names are global; `locate` says where they live.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from megatron_nsr.models.hf_config import Family, MixtureOfExperts, ModelShape
from megatron_nsr.weights.layouts import ColumnSharded, FusedGateUp, FusedQKV, Layout, PaddedVocabulary, Replicated, WholeGateUp

if TYPE_CHECKING:
    from megatron_nsr.models.policy import PolicyModel


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter and the HF tensors it is made of; `{layer}` and `{expert}` stand for numbers in all names.

    te_name: what the te backend calls the parameter, whose linear layers hold the norm in front of them; checkpoints of either
        backend use this name.
    tied_copy: the last stage's copy of a tied embedding: loaded from the embedding's tensor, never exported.
    expert: the global number of the expert that the HF names belong to, None for what is no expert's.
    """

    megatron: str
    hf: tuple[str, ...]
    layout: Layout
    te_name: str | None = None
    tied_copy: bool = False
    expert: int | None = None

    @property
    def of_experts(self) -> bool:
        """Whether there is one such parameter for each expert."""
        return "{expert}" in self.megatron

    def of_layer(self, layer: int, expert: int | None = None) -> Entry:
        """The entry with the HF names of one global layer, and of one global expert where it has one each."""
        return replace(self, hf=tuple(name.format(layer=layer, expert=expert) for name in self.hf), expert=expert)

    @property
    def checkpoint_key(self) -> str:
        """The parameter's name in a checkpoint, which holds all layers of a kind as one tensor, the layer being its first dimension.

        For experts the second dimension is the expert, and either backend uses the same name.
        """
        name = self.megatron.replace("local_experts.{expert}", "experts") if self.of_experts else self.te_name or self.megatron
        return name.replace("{layer}.", "")


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
_ATTENTION = (
    Entry(
        _LAYER + "input_layernorm.weight",
        (_HF_LAYER + "input_layernorm.weight",),
        Replicated(),
        te_name=_LAYER + "self_attention.linear_qkv.layer_norm_weight",
    ),
    Entry(_LAYER + "self_attention.linear_qkv.weight", tuple(f"{_HF_LAYER}self_attn.{x}_proj.weight" for x in "qkv"), FusedQKV()),
    Entry(_LAYER + "self_attention.linear_proj.weight", (_HF_LAYER + "self_attn.o_proj.weight",), ColumnSharded()),
)
_MLP = (
    Entry(
        _LAYER + "pre_mlp_layernorm.weight",
        (_HF_LAYER + "post_attention_layernorm.weight",),
        Replicated(),
        te_name=_LAYER + "mlp.linear_fc1.layer_norm_weight",
    ),
    Entry(_LAYER + "mlp.linear_fc1.weight", tuple(f"{_HF_LAYER}mlp.{x}_proj.weight" for x in ("gate", "up")), FusedGateUp()),
    Entry(_LAYER + "mlp.linear_fc2.weight", (_HF_LAYER + "mlp.down_proj.weight",), ColumnSharded()),
)

_EXPERT, _HF_EXPERT = _LAYER + "mlp.experts.", _HF_LAYER + "mlp.experts.{expert}."
_EXPERTS = (
    # Not fused with a linear layer by either backend: the router reads the norm's output too.
    Entry(_LAYER + "pre_mlp_layernorm.weight", (_HF_LAYER + "post_attention_layernorm.weight",), Replicated()),
    Entry(_LAYER + "mlp.router.weight", (_HF_LAYER + "mlp.gate.weight",), Replicated()),
    Entry(
        _EXPERT + "local_experts.{expert}.linear_fc1.weight",
        tuple(f"{_HF_EXPERT}{x}_proj.weight" for x in ("gate", "up")),
        WholeGateUp(),
        te_name=_EXPERT + "linear_fc1.weight{expert}",
    ),
    Entry(
        _EXPERT + "local_experts.{expert}.linear_fc2.weight",
        (_HF_EXPERT + "down_proj.weight",),
        Replicated(),
        te_name=_EXPERT + "linear_fc2.weight{expert}",
    ),
)

LAYER_ENTRIES: Mapping[Family, tuple[Entry, ...]] = {
    "qwen2": (*_ATTENTION, *_MLP, _QKV_BIAS),
    "qwen3": (*_ATTENTION, *_MLP, *_QK_NORMS),
    "llama": (*_ATTENTION, *_MLP),
    "qwen3_moe": (*_ATTENTION, *_QK_NORMS, *_EXPERTS),
}


def whole_model_entries(shape: ModelShape) -> Iterator[tuple[int | None, Entry]]:
    """(global layer or None, entry with the HF names filled in) in the order of export; every HF tensor once, tied copies left out."""
    yield None, EMBEDDING
    entries = LAYER_ENTRIES[shape.family]
    experts = range(shape.moe.experts if shape.moe else 0)
    for layer in range(shape.num_layers):
        yield from ((layer, entry.of_layer(layer)) for entry in entries if not entry.of_experts)
        yield from ((layer, entry.of_layer(layer, expert)) for expert in experts for entry in entries if entry.of_experts)
    yield None, FINAL_NORM
    if not shape.tie_embeddings:
        yield None, HEAD


def hf_names(shape: ModelShape) -> list[str]:
    """Every HF tensor of the model, in the order of export."""
    return [name for _, entry in whole_model_entries(shape) for name in entry.hf]


def hf_tensor_shape(name: str, shape: ModelShape) -> tuple[int, ...]:
    """The whole tensor's dimensions on disk."""
    if shape.moe and ".mlp." in name:
        return _moe_tensor_shape(name, shape, shape.moe)
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


def _moe_tensor_shape(name: str, shape: ModelShape, moe: MixtureOfExperts) -> tuple[int, ...]:
    if name.endswith("mlp.gate.weight"):
        return moe.experts, shape.hidden
    return (shape.hidden, moe.ffn) if name.endswith("down_proj.weight") else (moe.ffn, shape.hidden)


@dataclass(frozen=True, slots=True)
class Location:
    """Where a layer lives: the pipeline rank, the virtual stage there, and the layer's number inside that chunk.

    An expert lives on one expert-parallel rank, with a number of its own there; for everything else, which all expert-parallel ranks
    have, these are 0.
    """

    pipeline_rank: int
    vp_stage: int
    index: int
    expert_rank: int = 0
    expert: int = 0


def locate_layer(layer: int, num_layers: int, pipeline: int, virtual_pipeline: int) -> Location:
    """The only translation between global and local layer numbers: chunks of equal size go round the pipeline ranks."""
    per_chunk = num_layers // (pipeline * virtual_pipeline)
    chunk, index = divmod(layer, per_chunk)
    return Location(chunk % pipeline, chunk // pipeline, index)


def locate(
    layer: int | None, entry: Entry, num_layers: int, pipeline: int, virtual_pipeline: int, experts_per_rank: int | None = None
) -> Location:
    """Where an entry's parameter lives; the embedding is on the first stage, the final norm and the head on the last.

    experts_per_rank: experts of a layer that one expert-parallel rank holds; None: all of them.
    """
    if layer is not None:
        where = locate_layer(layer, num_layers, pipeline, virtual_pipeline)
        if entry.expert is None:
            return where
        expert_rank, expert = divmod(entry.expert, experts_per_rank) if experts_per_rank else (0, entry.expert)
        return replace(where, expert_rank=expert_rank, expert=expert)
    return Location(0, 0, 0) if entry is EMBEDDING else Location(pipeline - 1, virtual_pipeline - 1, 0)


def local_parameter(entry: Entry, where: Location, parameters: Mapping[str, Tensor]) -> tuple[str, Tensor]:
    """The chunk's (name, parameter) of an entry, under either backend's name. Raises RuntimeError where there is none."""
    names = [name.format(layer=where.index, expert=where.expert) for name in (entry.megatron, entry.te_name) if name is not None]
    for name in names:
        if name in parameters:
            return name, parameters[name]
    raise RuntimeError(f"the model has no parameter {' or '.join(names)} for {', '.join(entry.hf)}")


def chunk_entries(chunks: Sequence[PolicyModel], shape: ModelShape) -> Iterator[tuple[int, Entry, str, Tensor]]:
    """(chunk number, entry with HF names filled in, local name, parameter) of everything on this rank, tied copies included."""
    groups = chunks[0].pg_collection
    experts_per_rank = shape.moe.experts // groups.ep.size() if shape.moe else None
    parameters = [dict(chunk.named_parameters()) for chunk in chunks]
    for layer, entry in whole_model_entries(shape):
        where = locate(layer, entry, shape.num_layers, groups.pp.size(), len(chunks), experts_per_rank)
        mine = entry.expert is None or where.expert_rank == groups.ep.rank()
        if mine and where.pipeline_rank == groups.pp.rank():
            yield where.vp_stage, entry, *local_parameter(entry, where, parameters[where.vp_stage])
    if shape.tie_embeddings and TIED_HEAD.megatron in parameters[-1]:
        yield len(chunks) - 1, TIED_HEAD, TIED_HEAD.megatron, parameters[-1][TIED_HEAD.megatron]
