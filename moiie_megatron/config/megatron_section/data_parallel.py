"""The tables of the ``ddp`` section: fields of DistributedDataParallelConfig."""

from __future__ import annotations

from typing import Final

from moiie_megatron.config.megatron_section.table import Allowed, Refused
from moiie_megatron.config.section import PositiveInt

_OVERLAP: Final = "`overlap_grad_reduce`"
_DISTRIBUTED: Final = "`optimizer.distributed`"
_BF16: Final = "`train.precision: bf16`"

ALLOWED: Final[dict[str, Allowed]] = {
    "overlap_grad_reduce": Allowed(
        bool,
        "reduce gradients bucket by bucket during the backward pass; default: on GPUs",
        "the same up to rounding",
    ),
    "overlap_param_gather": Allowed(
        bool,
        "gather updated weights bucket by bucket during the next forward pass; default: on GPUs, "
        "with `overlap_grad_reduce` and `optimizer.distributed`",
        "the same",
        f"{_OVERLAP} and {_DISTRIBUTED}",
    ),
    "bucket_size": Allowed(
        PositiveInt,
        "parameters of a bucket; default: 40 million, or 1 million times the data-parallel ranks "
        "if that is more",
        "the same up to rounding",
        _OVERLAP,
    ),
    "pad_buckets_for_high_nccl_busbw": Allowed(
        bool,
        "pad buckets to a multiple of 65536 times the data-parallel ranks, which NCCL sends "
        "faster (default false)",
        "the same",
        _DISTRIBUTED,
    ),
    "grad_reduce_in_fp32": Allowed(
        bool,
        "add up and reduce gradients in fp32 (default true); false: in bf16, which halves what is "
        "sent and the memory of gradients",
        "different",
        _BF16,
    ),
    "reduce_scatter_with_fp32_accumulation": Allowed(
        bool,
        "send bf16 gradients with an all-to-all and add them up in fp32 (default false)",
        "different",
        f"`grad_reduce_in_fp32: false` and {_DISTRIBUTED}; not with `average_in_collective`",
    ),
    "average_in_collective": Allowed(
        bool,
        "let NCCL average gradients instead of dividing them before their sum (default false)",
        "the same up to rounding",
        "a GPU",
    ),
}

OWNED: Final = {"use_distributed_optimizer": "optimizer.distributed"}

REFUSED: Final = (
    Refused(
        "it is for interleaved pipeline stages",
        ("align_param_gather",),
        "use overlap_param_gather",
    ),
    Refused(
        "all data-parallel ranks share one set of optimizer states",
        ("num_distributed_optimizer_instances",),
    ),
    Refused(
        "a step whose gradient is not finite is skipped instead",
        ("check_for_nan_in_grad", "check_for_large_grads"),
        "use train.max_skipped_steps and train.spike_factor",
    ),
    Refused("a number of buckets is not in all versions", ("num_buckets",), "use bucket_size"),
    Refused(
        "gradients of all weights are added up in one dtype",
        ("param_name_patterns_for_fp32_local_accumulation",),
        "use grad_reduce_in_fp32",
    ),
    Refused(
        "FP8 and FP4 are not supported",
        (
            "fp8_param_gather",
            "fp4_param_gather",
            "reuse_grad_buf_for_mxfp8_param_ag",
            "keep_fp8_transpose_cache",
        ),
        "use train.precision=bf16",
    ),
    Refused(
        "FSDP is not supported",
        (
            "use_megatron_fsdp",
            "use_custom_fsdp",
            "data_parallel_sharding_strategy",
            "outer_dp_sharding_strategy",
            "gradient_reduce_div_fusion",
            "suggested_communication_unit_size",
            "preserve_fp32_weights",
            "fsdp_*",
            "megatron_fsdp_*",
        ),
        "use optimizer.distributed",
    ),
    Refused(
        "buffers registered with NCCL have not been tried with this model",
        ("nccl_ub", "disable_symmetric_registration"),
    ),
    Refused(
        "weight gradients are computed with the others, as the overlap of expert parallelism is "
        "not supported",
        ("delay_wgrad_compute",),
    ),
)
