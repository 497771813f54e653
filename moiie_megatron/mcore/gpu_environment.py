"""Settings of CUDA and torch that a run on GPUs needs, and what they do to fp32.

``examples/environment.sh`` and the image set them before the program starts.  A run that was
started otherwise, say with plain torchrun, gets here what a process can still set for itself.
"""

from __future__ import annotations

import logging
import os
from collections.abc import MutableMapping
from typing import Any

import torch

# torch reads the first name and, where it is not set, the older one.
_ALLOCATOR_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
# The lengths of micro-batches vary, and so do the sizes of what is allocated: without segments
# that grow, freed memory is left in pieces of sizes that do not come again.
ALLOCATOR_SETTINGS = "expandable_segments:True"


def prepare_gpu_environment(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set what is not set yet; before the first use of a GPU.

    Logs a warning about what a process cannot set for itself any more.
    """
    # Read by the driver when the process first uses a GPU: kernels run in the order in which they
    # were started, on which Megatron's tensor parallelism relies to overlap.
    environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not any(environ.get(name) for name in _ALLOCATOR_NAMES):
        # torch may have read the variable while it was imported.
        environ[_ALLOCATOR_NAMES[0]] = ALLOCATOR_SETTINGS
        torch._C._accelerator_setAllocatorSettings(ALLOCATOR_SETTINGS)
    if environ.get("OMP_NUM_THREADS") == "1":
        logging.getLogger(__name__).warning(
            "OMP_NUM_THREADS is 1, which torchrun sets where nothing else is: saving and loading "
            "checkpoints is faster with OMP_NUM_THREADS=8, as examples/torchrun.sh sets it."
        )


def tf32_users(
    transformer_engine: bool, environ: MutableMapping[str, str] = os.environ
) -> list[str]:
    """Which fp32 products on a GPU have their factors rounded to TF32, in words.

    TF32 has the range of fp32 and 10 bits of mantissa instead of 23.

    Args:
        transformer_engine: Whether the model is built of Transformer Engine's modules.
    """
    # cuBLAS and cuDNN obey this variable whatever their callers ask for (cuBLAS manual).
    if environ.get("NVIDIA_TF32_OVERRIDE") == "0":
        return []
    users = []
    if transformer_engine:  # always asks cuBLAS for it (cublaslt_gemm.cu)
        users.append("Transformer Engine's layers")
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        users.append("torch's matrix products")
    cudnn: Any = torch.backends.cudnn
    if cudnn.conv.fp32_precision == "tf32":  # torch's default
        users.append("convolutions (vision encoder)")
    return users
