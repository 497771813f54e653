"""From a run's configuration to Megatron-Core's configuration objects.

This is the one file that *writes* fields of Megatron's configuration classes.  Modules of moe/,
vlm/ and mcore/ read the few that they need (``moe_router_topk``, ``params_dtype``,
``sequence_parallel``, ...), as Megatron's own modules do.  A field that a version of
Megatron-Core renames has to be changed here and where it is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend

from moiie_megatron.config.megatron_section.sections import (
    ddp_fields,
    megatron_fields,
    optimizer_fields,
)
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.mcore.device import Device
from moiie_megatron.mcore.device_checks import check_device, overlaps_grad_reduce
from moiie_megatron.mcore.patches.output_layer import HAS_APEX_EXTENSION
from moiie_megatron.utils.errors import UserError

_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def torch_dtype(config: RunConfig) -> torch.dtype:
    """The dtype of weights and activations."""
    return _DTYPES[config.train.precision]


def transformer_config(config: RunConfig, device: Device) -> TransformerConfig:
    """Megatron's configuration of the language model of this run.

    Raises:
        UserError: A section of Megatron-Core's fields, or what it needs and this device lacks.
    """
    check_device(config, device)
    given = megatron_fields(config)
    if "attention_backend" in given:
        given["attention_backend"] = AttnBackend[given["attention_backend"]]
    language, moe, parallel = config.language, config.moe, config.parallel
    virtual, dtype = parallel.virtual_pipeline, torch_dtype(config)
    fields: dict[str, Any] = {
        "num_layers": language.num_layers,
        "hidden_size": language.hidden_size,
        "ffn_hidden_size": language.ffn_hidden_size,
        "num_attention_heads": language.num_attention_heads,
        "num_query_groups": language.num_query_groups,
        "kv_channels": language.head_size,
        "add_qkv_bias": language.qkv_bias,
        "qk_layernorm": language.qk_norm,
        "layernorm_epsilon": language.norm_epsilon,
        "normalization": "RMSNorm",
        "activation_func": F.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "sequence_parallel": parallel.sequence_parallel,
        # Where micro-batches differ in length, pipeline stages send each other the shapes.
        "variable_seq_lengths": config.data.padding == "longest" and parallel.pipeline > 1,
        # Dense stages dispatch nothing, but Megatron's default refuses lengths that vary.
        "moe_token_dispatcher_type": "alltoall",
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "deterministic_mode": config.train.deterministic,
        "persist_layer_norm": False,
        # Fused kernels come with Transformer Engine; the same arithmetic runs without them.
        "bias_activation_fusion": device.is_cuda,
        # Megatron's own rotary embedding of packed rows would wait for their lengths in every
        # layer, when they are on the GPU.
        "apply_rope_fusion": device.transformer_engine,
        "cross_entropy_loss_fusion": device.transformer_engine,
        "cross_entropy_fusion_impl": "te" if device.transformer_engine else "native",
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": _fuses_weight_gradients(device),
        # Interleaved stages send and receive behind the computation, as Megatron-LM has it: two
        # ranks would else exchange several tensors in one batch of messages.
        "overlap_p2p_comm": virtual > 1,
        "batch_p2p_comm": device.is_cuda and virtual == 1,
        # What has been sent to the next stage is needed for its place in the graph alone.  Of
        # interleaved stages Megatron would free what is still being sent, which Gloo does not hold.
        "deallocate_pipeline_outputs": parallel.pipeline > 1 and virtual == 1,
        "use_cpu_initialization": not device.is_cuda,
    }
    if parallel.pipeline > 1:
        fields["pipeline_model_parallel_layout"] = _pipeline_layout(config)
    if language.sliding_window is not None:
        # transformers: a token sees `sliding_window` positions, itself included.
        fields["window_size"] = (language.sliding_window - 1, 0)
    if language.longrope is not None:
        # transformers multiplies queries and keys by the factor, hence its square in scores.
        factor = language.longrope.attention_factor
        fields["softmax_scale"] = factor**2 / math.sqrt(language.head_size)
    moe_layers = config.moe_layers
    if moe_layers:
        fields |= {
            "num_moe_experts": moe.layout.num_experts,
            "moe_layer_freq": [int(i in moe_layers) for i in range(language.num_layers)],
            "moe_ffn_hidden_size": language.ffn_hidden_size,
            "moe_router_topk": moe.top_k,
            "moe_router_dtype": "fp32" if moe.router_dtype == "fp32" else None,
            "moe_router_load_balancing_type": "none",  # ours: moe/losses.py
            # Megatron knows no moiie: MoIIELayer replaces the dispatcher that it has built.
            "moe_token_dispatcher_type": (
                "alltoall" if moe.dispatcher == "moiie" else moe.dispatcher
            ),
            "moe_grouped_gemm": True,
            "moe_permute_fusion": device.transformer_engine and moe.dispatcher != "moiie",
            "expert_model_parallel_size": parallel.expert,
            "expert_tensor_parallel_size": parallel.expert_tensor,
        }
    try:
        return TransformerConfig(**(fields | given))
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        if not config.megatron:
            raise
        raise UserError(
            f"Megatron-Core refuses the megatron section {config.megatron} "
            f"({str(error) or 'a failed assertion'}): change or leave out its keys."
        ) from error


def _pipeline_layout(config: RunConfig) -> list[list[str]]:
    """What each pipeline stage holds, virtual ones included, in the order of the model."""
    assert config.pipeline_layers is not None  # see config/validate_parallel.py
    layout = [["decoder"] * layers for layers in config.pipeline_layers]
    return [["embedding", *layout[0]], *layout[1:-1], [*layout[-1], "loss"]]


def _fuses_weight_gradients(device: Device) -> bool:
    """Whether weight gradients are added to fp32 buffers inside the matrix product.

    Transformer Engine's layers do it by themselves, Megatron's own ones with Apex's extension.
    """
    return device.is_cuda and (device.transformer_engine or HAS_APEX_EXTENSION)


def ddp_config(config: RunConfig, device: Device) -> DistributedDataParallelConfig:
    """Reductions of gradients, in fp32, and gathers of updated weights.

    On GPUs both overlap with the passes.
    """
    overlap = overlaps_grad_reduce(config, device)
    fields: dict[str, Any] = {
        "grad_reduce_in_fp32": True,
        "use_distributed_optimizer": config.optimizer.distributed,
        "overlap_grad_reduce": overlap,
        "overlap_param_gather": device.is_cuda and overlap and config.optimizer.distributed,
        "check_for_nan_in_grad": False,
    }
    return DistributedDataParallelConfig(**(fields | ddp_fields(config)))


def optimizer_config(config: RunConfig, device: Device) -> MegatronOptimizerConfig:
    """AdamW; learning rates come from the parameter groups (``part_overrides``)."""
    optimizer = config.optimizer
    given = optimizer_fields(config)
    max_lr = max(config.stage.learning_rates.values())
    fields: dict[str, Any] = {
        "optimizer": "adam",
        "lr": max_lr,
        "min_lr": max_lr * optimizer.min_lr_ratio,
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.beta1,
        "adam_beta2": optimizer.beta2,
        "adam_eps": optimizer.epsilon,
        "clip_grad": optimizer.clip_grad,
        "bf16": config.train.precision == "bf16",
        "params_dtype": torch_dtype(config),
        "use_distributed_optimizer": optimizer.distributed,
        "overlap_param_gather": ddp_config(config, device).overlap_param_gather,
        # Checkpoints hold the optimizer's copy of the weights whole.
        "store_param_remainders": False,
        "optimizer_offload_fraction": 1.0,
    }
    if given.get("optimizer_cpu_offload"):
        # Otherwise Megatron keeps a copy of the fp32 weights on the GPU.
        given["use_precision_aware_optimizer"] = True
    dtypes = {name: _DTYPES[value] for name, value in given.items() if name.endswith("_dtype")}
    return MegatronOptimizerConfig(**(fields | given | dtypes))


def part_overrides(
    config: RunConfig, optimizer: MegatronOptimizerConfig, marks: dict[str, str]
) -> dict[ParamKey, Any]:
    """Parameter-group settings: a learning rate per part, and no weight decay on vectors.

    Args:
        config: The run.
        optimizer: Its ``optimizer_config``.
        marks: Name of the attribute that marks the parameters of a part, by part.
    """
    overrides: dict[ParamKey, Any] = get_standard_config_overrides(optimizer)
    for part, lr in config.stage.learning_rates.items():
        overrides[ParamKey(attr=marks[part])] = {
            "max_lr": lr,
            "min_lr": lr * config.optimizer.min_lr_ratio,
        }
    return overrides


def lr_scheduler(config: RunConfig, optimizer: Any, steps: int) -> OptimizerParamScheduler:
    """Linear warm-up, then cosine decay, over ``steps`` optimizer steps in all."""
    max_lr = max(config.stage.learning_rates.values())
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=max_lr,
        min_lr=max_lr * config.optimizer.min_lr_ratio,
        lr_warmup_steps=min(round(config.optimizer.warmup_ratio * steps), steps - 1),
        lr_decay_steps=steps,
        lr_decay_style="cosine",
        start_wd=config.optimizer.weight_decay,
        end_wd=config.optimizer.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=False,
    )


def connect_schedules(ddp: Sequence[DistributedDataParallel]) -> None:
    """Set the callbacks of Megatron's pipeline schedules in the model's configuration.

    ``param_sync_func`` stays unset: the interleaved schedule alone calls it, and without it
    gathers of weights begin in the forward pass.  So does ``grad_scale_func``: losses are scaled
    for fp16 alone, and the configuration would keep the optimizer alive after the run.

    Args:
        ddp: The wrappers of this rank's chunks, which share one configuration.
    """
    config = ddp[0].config
    config.finalize_model_grads_func = finalize_model_grads
    if ddp[0].ddp_config.overlap_grad_reduce:
        no_sync = [wrapper.no_sync for wrapper in ddp]
        # Only the interleaved schedule takes a list.
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
