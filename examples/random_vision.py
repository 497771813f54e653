"""A tiny SigLIP with random weights as a Hugging Face directory.

It replaces a pretrained vision encoder where none can be downloaded, and is trained together with
the rest.  16 image tokens per image of 28 x 28 pixels, like the encoder of the built-in digits.

    python examples/random_vision.py --out models/tiny-siglip
"""

from __future__ import annotations

import argparse
from pathlib import Path

from moiie_megatron.cli.program import run_program
from moiie_megatron.utils.directories import new_directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if (options.out / "config.json").is_file():
        print(f"{options.out} already holds a model: nothing to do.")
        return
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(options.seed)
    config = SiglipVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
        vision_use_head=False,  # only patch features are used
    )
    with new_directory(options.out, num_bytes=1 << 20, force=True, marker="config.json") as beside:
        SiglipVisionModel(config).save_pretrained(beside)
    print(f"{options.out} holds a SigLIP with random weights.")


if __name__ == "__main__":
    run_program(main)
