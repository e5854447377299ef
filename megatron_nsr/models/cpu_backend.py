"""Layers in plain torch for machines without CUDA, through megatron-core 0.16.1's own extension points (module specs).

May import: megatron.core, platform, models.context_parallel, models.cpu_experts.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch.nn.functional import scaled_dot_product_attention

from megatron_nsr.models.context_parallel import SplitPacking, all_tokens
from megatron_nsr.models.cpu_experts import CpuRoutedLayer, experts_spec
from megatron_nsr.platform import cpu_patches


class CpuBackend:
    """The `cpu` backend: gloo, torch's attention and RMSNorm, no fused kernel."""

    name = "cpu"
    device = torch.device("cpu")
    token_dispatcher = "allgather"

    def __init__(self) -> None:
        cpu_patches.install()

    def config_overrides(self) -> dict[str, Any]:
        return {
            "use_cpu_initialization": True,
            "gradient_accumulation_fusion": False,
            "masked_softmax_fusion": False,
            "bias_activation_fusion": False,
            "bias_dropout_fusion": False,
            "apply_rope_fusion": False,
            "persist_layer_norm": False,
            "batch_p2p_sync": False,
            # pipeline_parallel/schedules.py frees a sent activation at once; gloo may not have read it yet.
            "deallocate_pipeline_outputs": False,
        }

    def block_spec(self, config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
        count = get_num_layers_to_build(config, vp_stage=vp_stage)
        return TransformerBlockSubmodules(layer_specs=[_layer_spec(config)] * count, layer_norm=_TorchNorm)

    def phase(self) -> AbstractContextManager[Any]:
        return cpu_patches.megatron_phase()


class _PackedSelfAttention(SelfAttention):
    """Self-attention whose packed sequences take their rotary frequencies by one lookup of each token's position.

    megatron-core's unfused path cuts the frequencies out in Python, sequence by sequence, twice a layer
    (models/common/embeddings/rope_utils.py, _apply_rotary_pos_emb_thd): 5 to 8 % of a small model's update. With a frequency for each
    token its path for `sbhd` does the same, so that is the format it is told; _SdpaAttention goes by `cu_seqlens_q`.
    """

    def forward(
        self,
        *args: Any,
        rotary_pos_emb: torch.Tensor,  # [max_seqlen, 1, 1, dim]
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if packed_seq_params is not None:
            positions = _positions(packed_seq_params.cu_seqlens_q)
            rotary_pos_emb = rotary_pos_emb[_own(positions, packed_seq_params)]
            packed_seq_params = replace(packed_seq_params, qkv_format="sbhd")
        output: tuple[torch.Tensor, torch.Tensor | None] = super().forward(
            *args, rotary_pos_emb=rotary_pos_emb, packed_seq_params=packed_seq_params, **kwargs
        )
        return output


def _positions(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Each token's place in its own sequence, int64 [tokens]."""
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), cu_seqlens.diff())
    return torch.arange(len(starts)) - starts


def _own(values: torch.Tensor, packing: PackedSeqParams) -> torch.Tensor:
    """This rank's part of values [tokens]."""
    return packing.mine(values) if isinstance(packing, SplitPacking) else values


class _SdpaAttention(MegatronModule):
    """megatron-core's core_attention by torch's scaled_dot_product_attention: plain or packed sequences, grouped queries, causal.

    With context parallelism a rank's queries meet the keys and values of all ranks, which are gathered.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_unused: Any,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal:
            raise ValueError(f"the cpu backend has causal attention only, not {attn_mask_type}")
        self.softmax_scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.context_group: dist.ProcessGroup | None = pg_collection.cp if pg_collection else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """[sequence, batch, heads, dim], where packed sequences are one row, a batch of 1; the output joins heads and dim.

        `attention_mask` is not read: the mask is causal within each sequence.
        """
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        output = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
        return output.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)

    def _packed(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: PackedSeqParams) -> torch.Tensor:
        """One call over right-padded sequences: with a causal mask nobody looks at the padding behind the last token."""
        lengths = packing.cu_seqlens_q.diff().long()
        queries = keys = _PaddedSequences(lengths)
        mask = None
        if isinstance(packing, SplitPacking) and packing.split is not None:
            assert self.context_group is not None
            key, value = all_tokens(torch.cat((key, value), dim=-1), packing.split, self.context_group).chunk(2, dim=-1)
            queries = _PaddedSequences(lengths // self.context_group.size())
            positions = queries.pad(packing.mine(_positions(packing.cu_seqlens_q))[:, None])  # [sequences, longest]
            mask = positions[:, None, :, None] >= torch.arange(keys.longest)
        query, key, value = (side.pad(x).transpose(1, 2) for side, x in ((queries, query), (keys, key), (keys, value)))
        return queries.unpad(self._attend(query, key, value, mask).transpose(1, 2)).flatten(1)[:, None]

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """[batch, heads, sequence, dim] in and out. mask: which keys a query sees; without one those up to its own place."""
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.softmax_scale,
            enable_gqa=query.size(1) != key.size(1),
        )

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        return {}


class _PaddedSequences:
    """Packed sequences of these lengths as the rows of a rectangle, padded on the right with zeros."""

    def __init__(self, lengths: torch.Tensor) -> None:
        self.count, self.longest = len(lengths), int(lengths.max())
        ends = lengths.cumsum(0)
        offsets = torch.arange(self.count) * self.longest - (ends - lengths)
        self.index = torch.repeat_interleave(offsets, lengths) + torch.arange(int(ends[-1]))

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, 1, ...] to [sequences, longest, ...]."""
        padded = x.new_zeros(self.count * self.longest, *x.shape[1:]).index_copy(0, self.index, x)
        return padded.view(self.count, self.longest, *x.shape[2:])

    def unpad(self, x: torch.Tensor) -> torch.Tensor:
        """[sequences, longest, ...] to [tokens, ...]."""
        return x.flatten(0, 1).index_select(0, self.index)


class _TorchNorm:
    """Builds torch's RMSNorm. megatron-core's WrappedTorchNorm (transformer/torch_norm.py) refuses sequence parallelism, yet all
    it lacks is the attribute by which finalize_model_grads sums the weight's gradient over the tensor-parallel ranks."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: Any) -> torch.nn.RMSNorm:
        norm = torch.nn.RMSNorm(hidden_size, eps=eps, dtype=config.params_dtype)
        norm.weight.sequence_parallel = config.sequence_parallel
        return norm


class _CpuSpecProvider(LocalSpecProvider):
    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return _TorchNorm

    def core_attention(self) -> type:
        return _SdpaAttention


def _layer_spec(config: TransformerConfig) -> ModuleSpec:
    provider = _CpuSpecProvider()
    qk_norm = _TorchNorm if config.qk_layernorm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=provider.column_parallel_linear(),
        core_attention=provider.core_attention(),
        linear_proj=provider.row_parallel_linear(),
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    # A checkpoint written here has the keys of the te backend, whose linear layers hold their norm, but not the one before a router.
    names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if config.num_moe_experts is None:
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return ModuleSpec(
        module=TransformerLayer if config.num_moe_experts is None else CpuRoutedLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=_TorchNorm,
            self_attention=ModuleSpec(module=_PackedSelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=_TorchNorm,
            mlp=get_mlp_module_spec_for_backend(backend=provider) if config.num_moe_experts is None else experts_spec(provider),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=names,
        ),
    )
