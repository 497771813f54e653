"""Enumerations that Transformer Engine's Python and its extension share.

Numbers as in Transformer Engine's C header and ``csrc/common.h``.
"""

from __future__ import annotations

import enum

import torch
from packaging.version import Version


class DType(enum.IntEnum):
    """Element types."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


_TORCH = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
}


def torch_dtype(dtype: int) -> torch.dtype:
    """Raises NotImplementedError for 8 and 4 bits, which no stand-in computes with."""
    if dtype not in _TORCH:
        raise NotImplementedError(f"{DType(dtype).name} has no stand-in.")
    return _TORCH[DType(int(dtype))]


class FP8FwdTensors(enum.IntEnum):
    """Operands of a module's products, forward, by which FP8 scales are kept."""

    GEMM1_INPUT = 0
    GEMM1_WEIGHT = 1
    GEMM1_OUTPUT = 2
    GEMM2_INPUT = 3
    GEMM2_WEIGHT = 4
    GEMM2_OUTPUT = 5
    GEMM3_INPUT = 6
    GEMM3_WEIGHT = 7
    GEMM3_OUTPUT = 8


class FP8BwdTensors(enum.IntEnum):
    """The same, backward."""

    GRAD_OUTPUT1 = 0
    GRAD_INPUT1 = 1
    GRAD_OUTPUT2 = 2
    GRAD_INPUT2 = 3
    GRAD_OUTPUT3 = 4
    GRAD_INPUT3 = 5


class NVTE_QKV_Format(enum.IntEnum):
    """Order of the axes: sequence s, batch b, all tokens t, heads h, channels d."""

    NVTE_SBHD = 0
    NVTE_BSHD = 1
    NVTE_THD = 2
    NVTE_BSHD_2SBHD = 3
    NVTE_SBHD_2BSHD = 4
    NVTE_THD_2BSHD = 5
    NVTE_THD_2SBHD = 6
    NVTE_BHSD = 7
    NVTE_QKV_Format_NOT_SET = 8


def fused_attention_backends(version: Version) -> type[enum.IntEnum]:
    """``NVTE_Fused_Attn_Backend``; newer Python compares its members with the extension's."""
    members = {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2}
    if version < Version("2.13"):
        members["NVTE_F16_max512_seqlen"] = 0
    return enum.IntEnum("NVTE_Fused_Attn_Backend", members)
