"""The tables of the ``optimizer.megatron`` section: fields of OptimizerConfig."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field

from moiie_megatron.config.megatron_section.table import Allowed, Refused

Dtype = Literal["fp32", "bf16", "fp16"]
OffloadedFraction = Annotated[float, Field(gt=0.0, le=1.0)]

_AWARE: Final = "`use_precision_aware_optimizer`"
_OFFLOAD: Final = "`optimizer_cpu_offload`"

ALLOWED: Final[dict[str, Allowed]] = {
    "use_precision_aware_optimizer": Allowed(
        bool,
        "let Transformer Engine's Adam keep the fp32 weights and the moments, in dtypes of one's "
        "choice (default false)",
        "the same",
        "Transformer Engine, `optimizer.distributed` and `train.precision: bf16`",
    ),
    "main_params_dtype": Allowed(
        Literal["fp32", "fp16"],
        "dtype of the optimizer's copy of the weights (default fp32)",
        "different",
        _AWARE,
    ),
    "exp_avg_dtype": Allowed(
        Dtype, "dtype of the first moment (default fp32)", "different", _AWARE
    ),
    "exp_avg_sq_dtype": Allowed(
        Dtype, "dtype of the second moment (default fp32)", "different", _AWARE
    ),
    "optimizer_cpu_offload": Allowed(
        bool,
        "keep fp32 weights and moments in host memory and update them on the CPU (default false)",
        "the same up to rounding",
        "a GPU, Transformer Engine, `optimizer.distributed` and `train.precision: bf16`; moments "
        "and weights in fp32",
    ),
    "optimizer_offload_fraction": Allowed(
        OffloadedFraction,
        "fraction of the parameters whose states are in host memory (default 1)",
        "the same up to rounding",
        _OFFLOAD,
    ),
    "overlap_cpu_optimizer_d2h_h2d": Allowed(
        bool,
        "copy the next parameter's gradient while the CPU updates one (default false)",
        "the same",
        _OFFLOAD,
    ),
    "pin_cpu_grads": Allowed(
        bool, "pin host memory of gradients (default true)", "the same", _OFFLOAD
    ),
}

OWNED: Final = {
    "lr": "stage.learning_rates",
    "min_lr": "optimizer.min_lr_ratio",
    "decoupled_lr": "stage.learning_rates",
    "decoupled_min_lr": "optimizer.min_lr_ratio",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_eps": "optimizer.epsilon",
    "clip_grad": "optimizer.clip_grad",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "params_dtype": "train.precision",
    "use_distributed_optimizer": "optimizer.distributed",
    "overlap_param_gather": "ddp.overlap_param_gather",
    "main_grads_dtype": "ddp.grad_reduce_in_fp32",
}

REFUSED: Final = (
    Refused(
        "training uses AdamW, as in the paper",
        (
            "optimizer",
            "decoupled_weight_decay",
            "sgd_*",
            "muon_*",
            "adaptive_muon_*",
            "lion_*",
            "soap_*",
            "use_layer_wise_distributed_optimizer",
        ),
    ),
    Refused("weights that are vectors do not decay", ("apply_wd_to_qk_layernorm",)),
    Refused(
        "losses are scaled for FP16 only, which is not supported",
        ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"),
    ),
    Refused(
        "FP8 is not supported",
        ("fp8_recipe", "reuse_grad_buf_for_mxfp8_param_ag"),
        "use train.precision=bf16",
    ),
    Refused(
        "it is for interleaved pipeline stages",
        ("overlap_param_gather_with_optimizer_step",),
        "use ddp.overlap_param_gather",
    ),
    Refused(
        "a step is skipped only if its gradient is not finite",
        ("grad_norm_skip_threshold",),
        "use optimizer.clip_grad and train.spike_factor",
    ),
    Refused(
        "checkpoints hold the optimizer's copy of the weights whole, so that every run reads them",
        ("store_param_remainders",),
        "use main_params_dtype",
    ),
    Refused("CUDA graphs are not supported", ("optimizer_cuda_graph",)),
    Refused(
        "Megatron-Core does not read it with AdamW",
        ("use_torch_optimizer_for_cpu_offload", "pin_cpu_params"),
    ),
    Refused(
        "no log of this project has it",
        ("log_num_zeros_in_grad", "barrier_with_L1_time"),
        "see profile.steps",
    ),
    Refused("it is an object of Python, which a YAML file cannot hold", ("timers",)),
    Refused(
        "the configuration of a run is in its output directory",
        ("config_logger_dir",),
        "leave it out and see OUTPUT/config.yaml",
    ),
)
