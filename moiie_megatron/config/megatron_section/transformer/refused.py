"""Fields of Megatron-Core's TransformerConfig that the ``megatron`` section may not set, and why.

Names are those of Megatron-Core 0.16 and 0.19; a name with ``*`` stands for all that match.
"""

from __future__ import annotations

from typing import Final

from moiie_megatron.config.megatron_section.table import Refused

REFUSED: Final = (
    # Parallelism.
    Refused(
        "the interleaved schedule has one form only",
        ("microbatch_group_size_per_vp_stage", "overlap_p2p_comm_warmup_flush"),
    ),
    Refused(
        "pipeline stages communicate in one way only, which train.device decides",
        ("use_ring_exchange_p2p", "batch_p2p_sync", "pipeline_model_parallel_comm_backend"),
    ),
    Refused(
        "context parallelism is not supported",
        (
            "context_parallel_size",
            "hierarchical_context_parallel_sizes",
            "hybrid_context_parallel",
            "max_seqlen_per_dp_cp_rank",
            "cp_comm_type",
        ),
    ),
    Refused(
        "sharding single weights over ranks is not supported",
        (
            "tensor_parallel_num_weight_shards",
            "expert_tensor_parallel_num_weight_shards",
            "gtp_weight_remat_size",
            "expert_gtp_weight_remat_size",
        ),
    ),
    Refused(
        "the overlap of tensor parallelism needs micro-batches of one fixed length",
        ("tp_comm_*",),
    ),
    Refused(
        "the overlap of expert parallelism bypasses vision encoder and token types",
        (
            "overlap_moe_expert_parallel_comm",
            "overlap_dispatch_backward_with_experts_wgrad",
            "delay_wgrad_compute",
            "ep_overlap_early_attn_memory_release",
            "high_priority_a2a_comm_stream",
        ),
    ),
    Refused(
        "the output layer sees labelled tokens alone, whose number changes from step to step",
        ("defer_embedding_wgrad_compute", "wgrad_deferral_limit"),
    ),
    # Memory and speed.
    Refused(
        "sequence parallelism already divides what is saved",
        ("distribute_saved_activations",),
        "leave it out, tensor parallelism uses sequence parallelism unless told otherwise",
    ),
    Refused(
        "the training step recomputes in every micro-batch",
        ("num_microbatches_with_partial_activation_checkpoints",),
        "use recompute_granularity",
    ),
    Refused(
        "offloading to host memory is not supported",
        (
            "cpu_offloading",
            "cpu_offloading_*",
            "_cpu_offloading_context",
            "fine_grained_activation_offloading",
            "fine_grained_offloading_max_inflight_offloads",
            "offload_modules",
            "min_offloaded_tensor_size",
            "activation_offload_fraction",
            "delay_offload_until_cuda_graph",
            "delta_offload_bytes_across_pp_ranks",
            "moe_paged_stash*",
        ),
        "use recompute_granularity to save memory",
    ),
    Refused(
        "CUDA graphs are not supported, as the number of rows of an expert changes",
        ("cuda_graph_*", "enable_cuda_graph", "external_cuda_graph"),
    ),
    Refused(
        "FP8 and FP4 are not supported",
        (
            "fp8",
            "fp8_*",
            "fp4",
            "fp4_*",
            "tp_only_amax_red",
            "first_last_layers_bf16",
            "num_layers_at_start_in_bf16",
            "num_layers_at_end_in_bf16",
            "activation_func_fp8_input_store",
            "disable_parameter_transpose_cache",
            "use_kitchen*",
            "kitchen_attention_backend",
            "quant_recipe",
        ),
        "use train.precision=bf16",
    ),
    Refused("it is for FP16, which is not supported", ("apply_query_key_layer_scaling",)),
    Refused(
        "weights and activations have one dtype",
        ("fp32_residual_connection", "disable_bf16_reduced_precision_matmul"),
        "use train.precision",
    ),
    Refused(
        "this kernel has not been tried with this model",
        (
            "fused_single_qkv_rope",
            "fused_residual_rmsnorm",
            "use_transformer_engine_op_fuser",
            "use_te_activation_func",
            "use_grouped_gemm_for_dense_mlp",
            "flash_attention_version",
            "mlp_chunks_for_training",
        ),
    ),
    # Experts.
    Refused(
        "routing is that of the paper",
        ("moe_router_*", "moe_enable_routing_replay"),
        "use the moe section",
    ),
    Refused(
        "experts that serve every token are the shared group of the moe section",
        ("moe_shared_expert_*", "use_grouped_gemm_for_shared_expert"),
        "use moe.num_shared_experts",
    ),
    Refused(
        "no token is dropped and no expert has a capacity, as in the paper",
        (
            "moe_expert_capacity_factor",
            "moe_expert_rank_capacity_factor",
            "moe_pad_expert_input_to_capacity",
            "moe_token_drop_policy",
            "moe_token_dropping",
        ),
    ),
    Refused(
        "the experts and dispatchers of this project do not read it",
        (
            "moe_input_jitter_eps",
            "moe_per_layer_logging",
            "moe_extended_tp",
            "moe_use_legacy_grouped_gemm",
        ),
        inert=True,
    ),
    Refused(
        "the default dispatcher has rows of its own, and Megatron's have not been tried with it",
        (
            "moe_permute_fusion_into_hybridep",
            "moe_single_grouped_weight",
            "moe_single_grouped_bias",
            "moe_mlp_glu_interleave_size",
        ),
    ),
    Refused(
        "the flex dispatcher runs with DeepEP and its defaults",
        (
            "moe_flex_dispatcher_*",
            "moe_deepep_num_sms",
            "moe_hybridep_*",
            "moe_ncclep_*",
        ),
    ),
    Refused("a token has several experts", ("moe_apply_probs_on_input",)),
    Refused("the experts have no latent projection", ("moe_latent_size",)),
    # The model.
    Refused(
        "it changes the model in a way that checkpoints and exported models cannot express",
        (
            "apply_residual_connection_post_layernorm",
            "layernorm_zero_centered_gamma",
            "glu_linear_offset",
            "activation_func_clamp_value",
            "rotary_interleaved",
            "mrope_section",
            "no_rope_freq",
            "window_attn_skip_freq",
            "softmax_type",
            "qk_l2_norm",
            "attention_output_gate",
            "multi_latent_attention",
            "experimental_attention_variant",
            "experimental_attention_variant_loss_scale_func",
            "dsa_*",
            "linear_*",
            "heterogeneous_block_specs",
            "hetereogenous_dist_checkpoint",
            "is_hybrid_model",
            "mamba_*",
            "use_mamba_mem_eff_path",
        ),
        "use the language section",
    ),
    Refused("maximal update parametrization is not supported", ("use_mup", "mup_*")),
    Refused("multi-token prediction is not supported", ("mtp_*",)),
    Refused(
        "no optimizer step here clips query and key weights",
        ("qk_clip", "qk_clip_*", "log_max_attention_logit"),
    ),
    Refused(
        "weights are always initialized",
        ("perform_initialization", "init_model_with_meta_device"),
    ),
    # What belongs to other programs.
    Refused(
        "it is an object of Python, which a YAML file cannot hold",
        ("*_func", "timers", "init_method", "output_layer_init_method", "embedding_init_method"),
    ),
    Refused(
        "the loss is a mean over the label tokens of the global batch",
        ("calculate_per_token_loss",),
    ),
    Refused(
        "it concerns inference with Megatron-Core, which this project does not use",
        (
            "inference_*",
            "use_inference_optimized_layers",
            "flash_decode",
            "batch_invariant_mode",
            "mlp_chunks_for_prefill",
            "symmetric_ar_type",
            "nccl_all_reduce_for_prefill",
            "moe_pad_experts_for_cuda_graph_inference",
        ),
    ),
    Refused(
        "the configuration of a run is in its output directory",
        ("config_logger_dir",),
        "leave it out and see OUTPUT/config.yaml",
    ),
    Refused(
        "nothing in this model reads it",
        (
            "attention_softmax_in_fp32",
            "masked_softmax_fusion",
            "persist_layer_norm",
            "memory_efficient_layer_norm",
            "use_fused_weighted_squared_relu",
            "clone_scatter_output_in_embedding",
            "async_tensor_model_parallel_allreduce",
            "barrier_with_L1_time",
            "test_mode",
            "use_te_rng_tracker",
        ),
        inert=True,
    ),
)
