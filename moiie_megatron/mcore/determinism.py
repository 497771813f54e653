"""``train.deterministic``: the same bits from the same run on the same machines."""

from __future__ import annotations

import os

import torch


def set_determinism(enabled: bool) -> None:
    """Choose between the fastest kernels and deterministic ones.

    Must be called before CUDA and the process groups are initialised: cuBLAS, NCCL and
    Transformer Engine read the environment then.  Variables that are already set are kept.
    Reductions over ranks are reproducible with the same parallel layout, NCCL version and
    network topology only.
    """
    if enabled:
        # Makes cuBLAS deterministic: one workspace per stream (cuBLAS manual, reproducibility).
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # The same algorithm for every message size, and no in-network reduction (NVLS), which
        # adds in any order.
        os.environ.setdefault("NCCL_ALGO", "Ring")
        os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    torch.use_deterministic_algorithms(enabled)
