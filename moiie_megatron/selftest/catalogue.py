"""All checks, in the order in which they run: each relies on what the ones before have shown.

The limits are generous: the first steps on a GPU also compile Megatron-Core's fused functions.
"""

from __future__ import annotations

from typing import Final

from moiie_megatron.selftest.check import Check
from moiie_megatron.selftest.checks.collectives import check_collectives, start_groups
from moiie_megatron.selftest.checks.kernels import check_grouped_mm, check_packed_attention
from moiie_megatron.selftest.checks.parity import (
    LAYER_REFERENCES,
    MODEL_REFERENCES,
    check_layer,
    check_model,
    check_transformer_engine,
)
from moiie_megatron.selftest.checks.speed import check_layer_speed, check_step_speed
from moiie_megatron.selftest.checks.training import check_checkpoints, check_loss_curve
from moiie_megatron.selftest.checks.versions import check_versions

GROUPS: Final = "process-groups"
_REPORT: Final = "report it with the JSON file; until then, do not train here"

CHECKS: Final = (
    Check(
        name="versions",
        about="installed packages against the accepted ranges; GPU, driver, environment",
        run=check_versions,
        remedy="install what requirements.txt or docker/Dockerfile names",
        limit=60,
    ),
    Check(
        name=GROUPS,
        about="torch.distributed and Megatron's process groups on the chosen device",
        run=start_groups,
        remedy="look at the driver (nvidia-smi) and, with NCCL_DEBUG=INFO, at the network",
        limit=180,
        essential=True,
    ),
    Check(
        name="collectives",
        about="all-to-all with uneven and empty parts, all-gather, reduce-scatter, all-reduce",
        run=check_collectives,
        remedy="run again with NCCL_DEBUG=INFO, and with NCCL_P2P_DISABLE=1 to see whether the "
        "links between the GPUs are at fault",
        essential=True,
    ),
    Check(
        name="grouped-mm",
        about="grouped matrix products of experts, some without rows, against a loop in fp64",
        run=check_grouped_mm,
        remedy="this build of torch computes grouped_mm wrongly: install another version",
    ),
    Check(
        name="attention",
        about="attention on packed rows against every segment alone in fp64",
        run=check_packed_attention,
        remedy="this build of torch computes attention wrongly: install another version, or train "
        "with data.packing=false",
    ),
    Check(
        name="layer",
        about="MoIIE layer against the CPU: image, text, mixed; all dispatchers; fp32 and bf16",
        run=check_layer,
        remedy=_REPORT,
        limit=240,  # the first that waits for the CPU
        reference=LAYER_REFERENCES,
    ),
    Check(
        name="model",
        about="losses, gradients and update of a step against the CPU: padded, packed; fp32, bf16",
        run=check_model,
        remedy=_REPORT,
        limit=300,
        reference=MODEL_REFERENCES,
    ),
    Check(
        name="te",
        about="the same step with Transformer Engine's modules against the local ones",
        run=check_transformer_engine,
        remedy="train with train.transformer_impl=local, or install another Transformer Engine",
        needs=("transformer engine",),
        limit=300,
    ),
    Check(
        name="loss-curve",
        about="20 training steps on the built-in data against the committed losses of the CPU",
        run=check_loss_curve,
        remedy="install the versions of requirements.txt if the samples differ; else " + _REPORT,
        limit=300,
    ),
    Check(
        name="checkpoints",
        about="save, resume, export, load in transformers, compare logits",
        run=check_checkpoints,
        remedy="look whether the disk is full or --directory cannot be written; else " + _REPORT,
        needs=("directory",),
        limit=300,
    ),
    Check(
        name="layer-speed",
        about="MoIIE layer against matrix products alone, alltoall, Transformer Engine's experts",
        run=check_layer_speed,
        remedy="look for other processes on the GPU (nvidia-smi) and for throttled clocks",
    ),
    Check(
        name="step-speed",
        about="tokens per second, MFU and memory of stage 2 with the shapes of a 1B Llama",
        run=check_step_speed,
        remedy="look for other processes on the GPU (nvidia-smi) and for throttled clocks",
        needs=("time",),
        limit=240,
    ),
)
