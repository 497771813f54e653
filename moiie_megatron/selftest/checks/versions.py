"""Versions of what is installed, the GPUs, and the environment variables that matter."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from moiie_megatron.selftest.check import Finding, Session, failed, passed

# The distributions of optional parts, and the module that says whether they are there.
OPTIONAL: Final = {
    "transformer-engine": "transformer_engine",
    "apex": "fused_weight_gradient_mlp_cuda",  # its extension for fused weight gradients
    "flash-attn": "flash_attn",
    "deep-ep": "deep_ep",
}
VARIABLES: Final = (
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "OMP_NUM_THREADS",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)
_DRIVER: Final = Path("/proc/driver/nvidia/version")
_PROJECT: Final = "moiie-megatron"


def check_versions(session: Session) -> Finding:
    """Everything that the package requires is there in a version that it accepts."""
    problems = list(wrong_versions(requirements()))
    figures: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": _installed(),
        "optional": {name: _optional(name, module) for name, module in OPTIONAL.items()},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    if session.is_cuda:
        figures |= _cuda_figures(session.dist_env.local_rank)
    if not hasattr(torch.nn.functional, "grouped_mm"):
        problems.append(f"torch {torch.__version__} has no grouped_mm")
    if session.is_cuda and not torch.version.cuda:
        problems.append(f"torch {torch.__version__} is a build without CUDA")
    if problems:
        return failed("; ".join(problems), **figures)
    summary = f"Python {figures['python']}, torch {torch.__version__}"
    if session.is_cuda:
        summary += f", {figures['gpus']} x {figures['gpu']}, CUDA {figures['cuda']}"
    return passed(summary + _advice(session), **figures)


def requirements() -> list[Requirement]:
    """What the package requires, without its extras."""
    try:
        lines = metadata.requires(_PROJECT) or []
    except metadata.PackageNotFoundError:  # run from the sources
        file = Path(__file__).resolve().parents[3] / "pyproject.toml"
        lines = tomllib.loads(file.read_text())["project"]["dependencies"]
    found = [Requirement(line) for line in lines]
    return [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]


def wrong_versions(required: list[Requirement]) -> Iterator[str]:
    """A sentence about each requirement that is missing or out of range."""
    for requirement in required:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield f"{requirement.name} is not installed"
            continue
        # NVIDIA's images hold builds such as 2.10.0a0+b558c98, which come before 2.10 in order.
        release = Version(version).base_version
        if not requirement.specifier.contains(release):
            yield f"{requirement.name} is {version}, not {requirement.specifier}"


def _installed() -> dict[str, str]:
    """Versions of the required packages that are there."""
    found = {}
    for requirement in requirements():
        try:
            found[requirement.name] = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _optional(name: str, module: str) -> str | None:
    """The version of an optional part; None if it is not there."""
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "version unknown"


def _cuda_figures(local_rank: int) -> dict[str, Any]:
    """Driver, libraries, and the GPU of this process."""
    device = torch.cuda.get_device_properties(local_rank)
    driver = None
    if _DRIVER.exists():
        found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", _DRIVER.read_text())
        driver = found[1] if found else None
    nccl = torch.cuda.nccl.version()
    return {
        "cuda": torch.version.cuda,
        "driver": driver,
        "nccl": ".".join(map(str, nccl)),
        "cudnn": torch.backends.cudnn.version(),
        "gpu": device.name,
        "gpus": torch.cuda.device_count(),
        "compute_capability": f"{device.major}.{device.minor}",
        "memory_gib": round(device.total_memory / 2**30, 1),
    }


def _advice(session: Session) -> str:
    """What to set before training; nothing on a CPU."""
    if not session.is_cuda:
        return ""
    missing = []
    if os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") != "1":
        missing.append("CUDA_DEVICE_MAX_CONNECTIONS=1")
    allocator = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    if "expandable_segments:True" not in (allocator or ""):
        missing.append("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True")
    return f"; set {' and '.join(missing)} for training" if missing else ""
