"""Stops the build of the image if a part of the base was replaced or does not import.

python check_image.py constraints.txt            the image for GPUs
python check_image.py constraints.txt --cpu      a base without CUDA, to try the build itself
"""

import argparse
import importlib
from importlib.metadata import version
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("constraints", type=Path, help="name==version by line, as the base had it")
    parser.add_argument("--cpu", action="store_true", help="expect neither CUDA nor its packages")
    options = parser.parse_args()

    kept = options.constraints.read_text().split()
    for line in kept:
        name, _, wanted = line.partition("==")
        if version(name) != wanted:
            raise SystemExit(f"{name} is {version(name)}, the base had {wanted}.")
    if not any(line.lower().startswith("torch==") for line in kept):
        raise SystemExit("The base has no torch: give an image of PyTorch as BASE.")

    import torch

    if not hasattr(torch.nn.functional, "grouped_mm"):
        raise SystemExit(f"torch {torch.__version__} has no grouped_mm: give a newer BASE.")
    if not options.cpu:
        if not torch.version.cuda:
            raise SystemExit(f"torch {torch.__version__} has no CUDA: give another BASE.")
        importlib.import_module("transformer_engine.pytorch")
    for module in ("training.loop", "checkpoint.to_hf", "evaluation.generate", "analysis.curves"):
        importlib.import_module(f"moiie_megatron.{module}")
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}: {len(kept)} packages kept.")


if __name__ == "__main__":
    main()
