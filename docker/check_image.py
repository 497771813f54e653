"""Stops the build of the image if its parts do not belong together, and lists their versions.

python check_image.py constraints.txt            the image for GPUs
python check_image.py constraints.txt --cpu      a base without CUDA, to try the build itself
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ENGINE = "transformer-engine"
# What a minor version of Megatron-Core was released with, where its metadata names no range.
RELEASED_WITH = {
    "0.17": ">=2.12,<2.13",  # its base image, 26.02, has 2.12
    "0.18": ">=2.16,<2.17",  # github.com/NVIDIA/Megatron-LM/pull/5518
    "0.19": ">=2.17,<2.19",  # github.com/NVIDIA/Megatron-LM/pull/6698
}
# What a run does without them.
OPTIONAL = {
    "apex": "the output layer adds its weight gradients in a step of their own",
    "flash-attn": "Transformer Engine uses cuDNN's attention",
    "deep_ep": "moe.dispatcher=flex is refused",
}


def engine_range(core: str, requirements: list[str]) -> str:
    """The versions of Transformer Engine that a Megatron-Core belongs to; empty if unknown.

    Args:
        core: Version of Megatron-Core.
        requirements: Of its metadata, those of extras included.
    """
    declared = [Requirement(text) for text in requirements]
    ranges = (str(one.specifier) for one in declared if canonicalize_name(one.name) == ENGINE)
    return min(filter(None, ranges), default=RELEASED_WITH.get(".".join(core.split(".")[:2]), ""))


def problem(core: str, requirements: list[str], engine: str | None) -> str | None:
    """Why Megatron-Core and Transformer Engine do not belong together, or None."""
    wanted = engine_range(core, requirements)
    if engine is None:
        return "The base has no Transformer Engine: give an image of NVIDIA's PyTorch as BASE."
    if not wanted:
        return f"Nothing says which Transformer Engine megatron-core {core} belongs to."
    # NVIDIA's images may have builds from before or after a release: 2.12.0.dev0+5671fd36.
    if Version(engine).base_version not in SpecifierSet(wanted):
        return (
            f"megatron-core {core} belongs to Transformer Engine {wanted}, the base has {engine}: "
            "give another pair of BASE and CORE."
        )
    return None


def installed(name: str) -> str | None:
    """The version of a package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def replaced(constraints: list[str]) -> str | None:
    """Which part of the base is not the base's any more, or None."""
    for line in constraints:
        name, _, wanted = line.partition("==")
        if version(name) != wanted:
            return f"{name} is {version(name)}, the base had {wanted}."
    if not any(line.lower().startswith("torch==") for line in constraints):
        return "The base has no torch: give an image of PyTorch as BASE."
    return None


def check_gpu_parts() -> None:
    """Raise SystemExit unless torch, Transformer Engine and Megatron-Core fit each other."""
    import torch

    if not torch.version.cuda:
        raise SystemExit(f"torch {torch.__version__} has no CUDA: give another BASE.")
    reason = problem(version("megatron-core"), requires("megatron-core") or [], installed(ENGINE))
    if reason:
        raise SystemExit(reason)
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError) as error:
        if "libcuda.so" not in str(error):
            raise
        print(f"Transformer Engine needs a driver to import ({error}): check again on a GPU node.")


def report() -> str:
    """The versions of what runs depend on, one a line."""
    import torch

    nccl = torch.cuda.nccl.version() if torch.version.cuda else None
    lines = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "NCCL": nccl and ".".join(map(str, nccl)),
        "Megatron-Core": version("megatron-core"),
        "Transformer Engine": installed(ENGINE),
        "transformers": version("transformers"),
    }
    lines |= {name: installed(name) or f"absent: {what}" for name, what in OPTIONAL.items()}
    if installed("apex") and not importlib.util.find_spec("fused_weight_gradient_mlp_cuda"):
        lines["apex"] = f"without fused_weight_gradient_mlp_cuda: {OPTIONAL['apex']}"
    return "\n".join(f"{name:20}{value or 'absent'}" for name, value in lines.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("constraints", type=Path, help="name==version by line, as the base had it")
    parser.add_argument("--cpu", action="store_true", help="expect neither CUDA nor its packages")
    options = parser.parse_args()

    kept = options.constraints.read_text().split()
    if reason := replaced(kept):
        raise SystemExit(reason)

    import torch

    if not hasattr(torch.nn.functional, "grouped_mm"):
        raise SystemExit(f"torch {torch.__version__} has no grouped_mm: give a newer BASE.")
    if not options.cpu:
        check_gpu_parts()
    for module in ("training.loop", "convert.export", "generation.generator", "analysis.curves"):
        importlib.import_module(f"moiie_megatron.{module}")
    print(f"{report()}\n{len(kept)} packages of the base are as they were.")


if __name__ == "__main__":
    main()
