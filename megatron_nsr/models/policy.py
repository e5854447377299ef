"""The policy: megatron-core's GPTModel whose last stage hands its hidden states to a head of our own.

May import: megatron.core, config, types.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_nsr.config import ParallelConfig
from megatron_nsr.models.backends import Backend
from megatron_nsr.models.fp8 import Fp8, check_fp8, fp8_fields
from megatron_nsr.models.hf_config import Llama3Rope, MixtureOfExperts, ModelShape
from megatron_nsr.models.transformer_fields import checked_fields
from megatron_nsr.types import UserError

Head = Callable[[torch.Tensor, torch.Tensor, Any], Any]


class PolicyModel(GPTModel):
    """One (virtual) pipeline stage. Packed sequences (`thd`) go in as one row of tokens:

        cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)            # two sequences, of 5 and 7 tokens
        packing = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=7, max_seqlen_kv=7)
        with backend.phase():
            output = chunk(tokens[None], positions[None], None, labels=batch, packed_seq_params=packing)

    With sequence parallelism the tokens must be a multiple of parallel.tensor: append a sequence of padding, counted in cu_seqlens.
    Every stage needs `packed_seq_params`; only the first reads tokens, only the last reads labels. The last stage returns what
    `head(hidden, weight [vocab_shard, hidden], labels)` returns, the others their hidden states.

    hidden is [tokens, hidden], with sequence parallelism this tensor-parallel rank's part of the tokens. The head gathers it and
    returns its whole gradient. `vocab_shard` counts padded rows (`padded_vocab_size`); the head masks them.
    """

    def __init__(self, *args: Any, head: Head, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.head = head

    def head_weight(self) -> torch.Tensor:
        """The LM head's shard [vocab_shard, hidden] of the last stage; the embedding itself where the two are tied on one stage."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def _postprocess(self, hidden_states: torch.Tensor, input_ids: Any, position_ids: Any, labels: Any, *_args: Any, **_kwargs: Any) -> Any:
        if not self.post_process:
            return hidden_states
        return self.head(hidden_states.reshape(-1, hidden_states.size(-1)), self.head_weight(), labels)


def padded_vocab_size(vocab_size: int, tensor: int) -> int:
    """The vocabulary rounded up to a multiple of the tensor-parallel ranks; rows past `vocab_size` are zero and mean nothing."""
    return math.ceil(vocab_size / tensor) * tensor


def build_policy(
    shape: ModelShape,
    parallel: ParallelConfig,
    *,
    dtype: torch.dtype,
    backend: Backend,
    recompute: Literal["none", "selective", "full"],
    head: Head,
    model: type[PolicyModel] = PolicyModel,
    fields: Mapping[str, Any] | None = None,
    fp8: Fp8 | None = None,
) -> list[PolicyModel]:
    """This rank's model, one chunk per virtual stage, on the layout that `initialize_parallel` set up.

    The weights are not meaningful yet: fill them with `weights.loading.load_hf_weights`, from files or from `random_hf_tensors`, which
    gives the same model on every layout. All chunks share one TransformerConfig, `chunks[0].config`. model: another class of chunk.
    fields: further ones of the TransformerConfig, `model.transformer`.
    """
    config = transformer_config(shape, parallel, dtype=dtype, backend=backend, recompute=recompute, fields=fields, fp8=fp8)
    stages = [None] if parallel.virtual_pipeline == 1 else range(parallel.virtual_pipeline)
    with backend.phase(), torch.random.fork_rng(devices=[]):
        return [_build_chunk(model, shape, parallel, config, backend, head, stage) for stage in stages]


def _build_chunk(
    model: type[PolicyModel],
    shape: ModelShape,
    parallel: ParallelConfig,
    config: TransformerConfig,
    backend: Backend,
    head: Head,
    vp_stage: int | None,
) -> PolicyModel:
    chunk = model(
        config,
        backend.block_spec(config, vp_stage),
        vocab_size=padded_vocab_size(shape.vocab_size, parallel.tensor),
        max_sequence_length=shape.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=shape.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
        vp_stage=vp_stage,
        head=head,
    )
    for name, parameter in chunk.named_parameters():
        if ".experts." in name:
            # Their gradients are summed over the ranks that have the same experts but other tokens. tensor_parallel/layers.py says so only
            # with several expert-parallel ranks, but tensor-parallel ranks have other tokens too.
            parameter.allreduce = False
    if shape.rope_scaling is not None:
        # RotaryEmbedding(rope_scaling=True) fixes all but the factor (models/common/embeddings/rotary_pos_embedding.py).
        chunk.rotary_pos_emb.inv_freq = llama3_frequencies(shape.rope_theta, shape.head_dim, shape.rope_scaling)
    return chunk


def llama3_frequencies(theta: float, head_dim: int, rope: Llama3Rope) -> torch.Tensor:
    """Llama 3.1's rotary frequencies, float32 [head_dim / 2].

    Wavelengths longer than original / low_freq_factor are stretched by `factor`, those shorter than original / high_freq_factor
    kept, and those between blended linearly in original / wavelength (Llama 3.1 reference code, apply_scaling).
    """
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    turns = rope.original_max_positions * frequencies / (2 * math.pi)
    kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / rope.factor


def transformer_config(
    shape: ModelShape,
    parallel: ParallelConfig,
    *,
    dtype: torch.dtype,
    backend: Backend,
    recompute: Literal["none", "selective", "full"],
    fields: Mapping[str, Any] | None = None,
    fp8: Fp8 | None = None,
) -> TransformerConfig:
    """megatron-core's configuration of this model on this layout. Needs no process group.

    fields: the user's own. Raises UserError for one of them that is not to be set, where megatron-core refuses them together, and where
    the model cannot compute in FP8 or in float32.
    """
    if backend.name == "te" and dtype == torch.float32 and parallel.context > 1:
        layout = f"parallel.context={parallel.context}"
        raise UserError(f"model.dtype=float32: Transformer Engine has no attention for it with {layout}; take bfloat16")
    given = checked_fields(fields or {}, backend=backend.name, recompute=recompute)
    ours = _own_fields(shape, parallel, dtype, backend) | _recompute_fields(recompute)
    if fp8:
        check_fp8(fp8, shape, parallel, backend.name)
        ours |= fp8_fields(fp8)
    try:
        config = TransformerConfig(**(ours | given))
    except (ValueError, AssertionError) as error:
        if not given:
            raise
        raise UserError(f"model.transformer={dict(fields or {})}: megatron-core refuses it: {' '.join(str(error).split())}") from None
    # Set afterwards, as transformer_config.py (line 1827) refuses an all-gather of lengths that differ, which cpu_experts.py can.
    config.moe_token_dispatcher_type = backend.token_dispatcher
    return config


def _own_fields(shape: ModelShape, parallel: ParallelConfig, dtype: torch.dtype, backend: Backend) -> dict[str, Any]:
    """What model.transformer must not set; recomputation apart, whose details it may."""
    return dict(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.query_groups,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        qk_layernorm=shape.qk_norm,
        add_qkv_bias=shape.qkv_bias,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=shape.initializer_range,
        # Initialising also marks sharded weights as such (tensor_parallel/layers.py), which gradient norms rely on: never skip it.
        perform_initialization=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Packed micro-batches differ in length; a dense model, too, must then name this dispatcher (transformer_config.py).
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        **_layout_fields(parallel),
        **(_expert_fields(shape.moe, parallel) if shape.moe else {}),
        **backend.config_overrides(),
    )


def _layout_fields(parallel: ParallelConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "tensor_model_parallel_size": parallel.tensor,
        "context_parallel_size": parallel.context,
        "pipeline_model_parallel_size": parallel.pipeline,
        "sequence_parallel": parallel.sequence,
    }
    if parallel.virtual_pipeline > 1:
        fields["virtual_pipeline_model_parallel_size"] = parallel.virtual_pipeline
        # The interleaved schedule gives wrong numbers with batched point-to-point calls over gloo (p2p_communication.py).
        fields |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return fields


def _expert_fields(moe: MixtureOfExperts, parallel: ParallelConfig) -> dict[str, Any]:
    return {
        "num_moe_experts": moe.experts,
        "moe_ffn_hidden_size": moe.ffn,
        "moe_router_topk": moe.experts_per_token,
        # The softmax over the chosen experts alone is the normalised share of the softmax over all.
        "moe_router_pre_softmax": not moe.normalize,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",  # expert_routing.py has a loss of its own
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": 1,
    }


def _recompute_fields(recompute: Literal["none", "selective", "full"]) -> dict[str, Any]:
    if recompute == "none":
        return {}
    if recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
