"""``train.deterministic``: the same bits from the same run on the same machines."""

from __future__ import annotations

import os

import torch


def set_determinism(wanted: bool) -> None:
    """Choose between the fastest kernels and those that repeat their results.

    Call it before CUDA and the process groups start: cuBLAS, NCCL and Transformer Engine read
    the environment then.  Values that are set already are kept.  Sums over ranks are repeated
    on the same layout, NCCL version and topology only.
    """
    if wanted:
        # cuBLAS repeats its sums with a workspace of its own per stream (NVIDIA's manual).
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # One algorithm for every message size; in-network reduction (NVLS) sums in any order.
        os.environ.setdefault("NCCL_ALGO", "Ring")
        os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    torch.use_deterministic_algorithms(wanted)
