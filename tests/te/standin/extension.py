"""The module ``transformer_engine_torch``, in torch: what the project's path calls.

Everything else can be imported and is an error when it is called.
"""

from __future__ import annotations

import importlib.machinery
import types
from importlib.metadata import version

from packaging.version import Version

from tests.te.standin import gemm, multi_tensor, rmsnorm, rope
from tests.te.standin.absent import absent_module
from tests.te.standin.enums import (
    DType,
    FP8BwdTensors,
    FP8FwdTensors,
    NVTE_QKV_Format,
    fused_attention_backends,
)

NAME = "transformer_engine_torch"
FUNCTIONS = (
    gemm.generic_gemm,
    gemm.te_general_grouped_gemm,
    rmsnorm.rmsnorm_fwd,
    rmsnorm.rmsnorm_bwd,
    multi_tensor.multi_tensor_scale,
    multi_tensor.multi_tensor_l2norm,
    multi_tensor.multi_tensor_adam,
    rope.fused_rope_forward,
    rope.fused_rope_backward,
)


class FP8TensorMeta:
    """Scales of FP8 tensors; modules make one each, whether FP8 is used or not."""


def make() -> types.ModuleType:
    module = absent_module(NAME, False)
    module.__spec__ = importlib.machinery.ModuleSpec(NAME, None)
    values = {function.__name__: function for function in FUNCTIONS}
    values |= {
        "DType": DType,
        "FP8FwdTensors": FP8FwdTensors,
        "FP8BwdTensors": FP8BwdTensors,
        "NVTE_QKV_Format": NVTE_QKV_Format,
        "NVTE_Fused_Attn_Backend": fused_attention_backends(Version(version("transformer_engine"))),
        "FP8TensorMeta": FP8TensorMeta,
        "get_cudnn_version": lambda: 91800,
        "get_cublasLt_version": lambda: 130100,
        "get_num_cublas_streams": lambda: 4,
        "device_supports_multicast": lambda device: False,
    }
    module.__dict__.update(values)
    return module
