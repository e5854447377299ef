"""Which fields of megatron-core 0.16.1's TransformerConfig `model.transformer` may set, and why not the others.

May import: megatron.core, types. A field may be set where it changes memory, speed or rounding, and nothing else: vLLM computes the
same model from config.json, and log-probs of the two are compared. Every field stands in one of the tables; a test holds that.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping
from typing import Any

from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from pydantic import TypeAdapter, ValidationError

from megatron_nsr.types import UserError

ALLOWED: dict[str, str] = {
    "recompute_method": "how whole layers are recomputed; with training.recompute=full",
    "recompute_num_layers": "layers that are recomputed together, or with recompute_method=block at all; with training.recompute=full",
    "recompute_modules": "what is recomputed; with training.recompute=selective",
    "distribute_saved_activations": "saved activations cut over tensor-parallel ranks; without parallel.sequence",
    "num_microbatches_with_partial_activation_checkpoints": "micro-batches in flight whose every activation is recomputed",
    "cpu_offloading": "activations of layers in host memory, without pipeline stages and recomputation; te",
    "cpu_offloading_num_layers": "of how many layers; te",
    "cpu_offloading_activations": "whether at all; te",
    "cpu_offloading_double_buffering": "with two buffers; te",
    "fine_grained_activation_offloading": "activations of single modules in host memory; te",
    "offload_modules": "of which modules; te",
    "min_offloaded_tensor_size": "smallest tensor that goes, elements; te",
    "clone_scatter_output_in_embedding": "frees the embedding's whole output under parallel.sequence",
    "attention_backend": "flash (of the package flash-attn), fused, unfused, local or auto: the attention kernels; te",
    "deterministic_mode": "deterministic kernels; needs NVTE_ALLOW_NONDETERMINISTIC_ALGO=0 in the environment; te",
    "moe_permute_fusion": "one kernel for the permutation of tokens; te",
    "overlap_p2p_comm_warmup_flush": "transfers between stages overlap in warm-up and flush too; with parallel.virtual_pipeline",
}

# Ours: the key that sets a field.
SET_BY: dict[str, tuple[str, ...]] = {
    "parallel.tensor": ("tensor_model_parallel_size",),
    "parallel.pipeline": ("pipeline_model_parallel_size",),
    "parallel.virtual_pipeline": ("virtual_pipeline_model_parallel_size", "overlap_p2p_comm", "batch_p2p_comm"),
    "parallel.sequence": ("sequence_parallel",),
    "parallel.context": ("context_parallel_size",),
    "parallel.expert": ("expert_model_parallel_size",),
    "model.fp8": ("fp8", "fp8_recipe", "fp8_amax_history_len", "fp8_amax_compute_algo", "tp_only_amax_red"),
    "model.fp8_edge_layers": ("first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"),
    "model.dtype": ("params_dtype", "pipeline_dtype", "bf16", "fp16", "enable_autocast", "autocast_dtype", "fp32_residual_connection"),
    "model.backend": (
        *("use_cpu_initialization", "gradient_accumulation_fusion", "masked_softmax_fusion", "bias_activation_fusion"),
        *("bias_dropout_fusion", "apply_rope_fusion", "persist_layer_norm", "batch_p2p_sync", "deallocate_pipeline_outputs"),
        *("moe_grouped_gemm", "moe_token_dispatcher_type", "transformer_impl", "cp_comm_type"),
    ),
    "training.recompute": ("recompute_granularity",),
    "objective.router_aux_loss": ("moe_router_load_balancing_type", "moe_aux_loss_coeff"),
    "the model's config.json": (
        *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "normalization"),
        *(
            "layernorm_epsilon",
            "qk_layernorm",
            "add_qkv_bias",
            "add_bias_linear",
            "gated_linear_unit",
            "activation_func",
            "init_method_std",
        ),
        *("num_moe_experts", "moe_ffn_hidden_size", "moe_router_topk", "moe_router_pre_softmax"),
    ),
    "the training loop": (
        *("perform_initialization", "variable_seq_lengths", "expert_tensor_parallel_size", "moe_router_dtype", "timers"),
        *("finalize_model_grads_func", "grad_scale_func", "no_sync_func", "grad_sync_func", "param_sync_func"),
    ),
}

REFUSED: dict[str, tuple[str, ...]] = {
    "log-probs would be random, and those of an update not those of its samples": (
        *("attention_dropout", "hidden_dropout", "moe_input_jitter_eps", "moe_router_force_load_balancing"),
    ),
    "the policy would compute another model than config.json describes and the engine samples from": (
        *("softmax_scale", "softmax_type", "apply_residual_connection_post_layernorm", "layernorm_zero_centered_gamma", "window_size"),
        *("window_attn_skip_freq", "glu_linear_offset", "activation_func_clamp_value", "rotary_interleaved", "qk_l2_norm", "qk_clip"),
        *("qk_clip_alpha", "qk_clip_threshold", "attention_output_gate", "multi_latent_attention", "no_rope_freq", "mrope_section"),
        *("apply_query_key_layer_scaling", "experimental_attention_variant", "dsa_indexer_n_heads", "dsa_indexer_head_dim"),
        *("dsa_indexer_topk", "dsa_indexer_loss_coeff", "dsa_indexer_use_sparse_loss", "linear_attention_freq", "linear_conv_kernel_dim"),
        *("linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads", "linear_num_value_heads", "is_hybrid_model"),
        *("mamba_state_dim", "mamba_head_dim", "mamba_num_groups", "mamba_num_heads", "use_mamba_mem_eff_path", "mtp_num_layers"),
        *("mtp_loss_scaling_factor", "mtp_standalone", "heterogeneous_block_specs", "hetereogenous_dist_checkpoint"),
        *("moe_shared_expert_intermediate_size", "moe_shared_expert_gate", "moe_shared_expert_overlap", "moe_layer_freq"),
        *("moe_router_topk_limited_devices", "moe_router_num_groups", "moe_router_group_topk", "moe_router_topk_scaling_factor"),
        *("moe_router_score_function", "moe_router_enable_expert_bias", "moe_router_bias_update_rate", "moe_apply_probs_on_input"),
        *("moe_latent_size", "moe_token_dropping", "moe_expert_capacity_factor", "moe_pad_expert_input_to_capacity"),
        *("moe_token_drop_policy", "use_fused_weighted_squared_relu", "moe_enable_routing_replay"),
    ),
    "the loss and its denominator are the objective's (objective.*)": ("calculate_per_token_loss", "moe_z_loss_coeff"),
    "checkpoints, export and push expect stages of equally many layers": (
        *("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage", "pipeline_model_parallel_layout"),
        *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
    ),
    "checkpoints, export and push expect weights that are not quantized (model.fp8 computes in FP8 and keeps them)": (
        *("fp8_param", "fp4", "fp4_recipe", "fp4_param", "fp4_quantizer_factory", "quant_recipe"),
    ),
    "what is computed in FP8 is the recipe's (model.fp8)": (
        *("fp8_quantizer_factory", "fp8_margin", "fp8_interval", "fp8_wgrad", "fp8_dot_product_attention", "fp8_multi_head_attention"),
        *("activation_func_fp8_input_store", "disable_parameter_transpose_cache"),
        *("use_kitchen", "use_kitchen_attention", "kitchen_attention_backend"),
    ),
    "experts fill their tokens up themselves under model.fp8": ("moe_router_padding_for_quantization", "moe_router_padding_for_fp8"),
    "micro-batches differ in length, which a captured graph cannot": (
        *("enable_cuda_graph", "external_cuda_graph", "cuda_graph_impl", "cuda_graph_scope", "cuda_graph_use_single_mempool"),
        *("cuda_graph_retain_backward_graph", "cuda_graph_warmup_steps"),
    ),
    "it needs process groups, buffers or a schedule that are not set up here": (
        *("tp_comm_overlap", "tp_comm_bulk_wgrad", "tp_comm_bulk_dgrad", "tp_comm_overlap_ag", "tp_comm_overlap_rs"),
        *("tp_comm_overlap_rs_dgrad", "tp_comm_split_ag", "tp_comm_atomic_ag", "tp_comm_split_rs", "tp_comm_atomic_rs"),
        *("tp_comm_overlap_disable_qkv", "tp_comm_overlap_disable_fc1", "tp_comm_bootstrap_backend", "overlap_moe_expert_parallel_comm"),
        *(
            "delay_wgrad_compute",
            "ep_overlap_early_attn_memory_release",
            "hierarchical_context_parallel_sizes",
            "max_seqlen_per_dp_cp_rank",
        ),
        *("hybrid_context_parallel", "pipeline_model_parallel_comm_backend", "use_ring_exchange_p2p", "moe_extended_tp"),
        *("microbatch_group_size_per_vp_stage", "defer_embedding_wgrad_compute", "wgrad_deferral_limit", "moe_enable_deepep"),
        *("moe_flex_dispatcher_backend", "moe_deepep_num_sms", "moe_hybridep_num_sms", "batch_invariant_mode"),
    ),
    "nothing in these layers reads it": (
        *("attention_softmax_in_fp32", "disable_bf16_reduced_precision_matmul", "memory_efficient_layer_norm", "log_max_attention_logit"),
        *("test_mode", "init_method", "output_layer_init_method", "embedding_init_method", "embedding_init_method_std"),
        *("init_model_with_meta_device", "async_tensor_model_parallel_allreduce", "cross_entropy_loss_fusion", "cross_entropy_fusion_impl"),
        *("barrier_with_L1_time", "config_logger_dir", "flash_decode", "inference_rng_tracker", "inference_sampling_seed"),
        *("symmetric_ar_type", "use_inference_optimized_layers", "inference_fuse_tp_communication", "mlp_chunks_for_prefill"),
        *("use_te_rng_tracker", "use_te_activation_func", "fused_single_qkv_rope", "moe_use_legacy_grouped_gemm", "moe_layer_recompute"),
        *("moe_per_layer_logging", "moe_router_fusion", "cpu_offloading_weights", "_cpu_offloading_context"),
    ),
}


# Without this value of training.recompute megatron-core would ignore the field.
NEEDED_RECOMPUTE = {"recompute_method": "full", "recompute_num_layers": "full", "recompute_modules": "selective"}


def checked_fields(given: Mapping[str, Any], *, backend: str, recompute: str) -> dict[str, Any]:
    """`model.transformer` as TransformerConfig takes it.

    Raises UserError for a field that is unknown, not to be set, without effect here, or of another type, naming it and what would be right.
    """
    for name, value in given.items():
        field = f"model.transformer.{name}={value!r}"
        if name not in ALLOWED:
            raise UserError(f"{field}: {_why_not(name)}")
        if ALLOWED[name].endswith("; te") and backend != "te":
            raise UserError(f"{field}: only the te backend reads it, and this is the {backend} backend")
        if recompute != NEEDED_RECOMPUTE.get(name, recompute):
            raise UserError(f"{field}: it needs training.recompute={NEEDED_RECOMPUTE[name]}, not {recompute}")
    return {name: _typed(name, value) for name, value in given.items()}


def _typed(name: str, value: Any) -> Any:
    field = f"model.transformer.{name}={value!r}"
    if name == "attention_backend":
        if value not in AttnBackend.__members__:
            raise UserError(f"{field}: give one of {', '.join(AttnBackend.__members__)}")
        return AttnBackend[value]
    try:
        return TypeAdapter(typing.get_type_hints(TransformerConfig)[name]).validate_python(value, strict=True)
    except ValidationError as error:
        problem = str(error.errors()[0]["msg"])
        raise UserError(f"{field}: {problem[0].lower()}{problem[1:]}") from None


def _why_not(name: str) -> str:
    for key, names in SET_BY.items():
        if name in names:
            return f"{key} sets it"
    for reason, names in REFUSED.items():
        if name in names:
            return f"it must not be set: {reason}"
    close = difflib.get_close_matches(name, ALLOWED, n=1)
    return f"no such field; did you mean {close[0]}?" if close else f"no such field; what may be set: {', '.join(ALLOWED)}"
