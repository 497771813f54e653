"""Perplexity of language models on one English text, which upcycling must not change.

Needs torch and transformers, not this project.  With several directories the exit code is 1 if
one of them differs from the first by more than 1e-3.

    python examples/perplexity.py runs/smollm2/smollm2 runs/smollm2/untrained
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

TOLERANCE = 1e-3
TEXT = """\
The harbour was built where the river meets the sea, because ships that came from the north could
rest there before they went on. For two hundred years the town lived on salt, rope and fish. When
the railway arrived, the merchants feared that nobody would need the harbour any more, but the
opposite happened: the trains brought grain and coal to the quay, and the ships carried both to
places that had neither. Today the old warehouses are full of small shops and offices. On Sundays
people walk along the water, watch the ferries turn, and buy coffee from a man who says that his
great-grandfather sold bread at the same corner. If you ask him about the weather, he looks at the
clouds above the lighthouse, waits a moment, and tells you that it is going to rain.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "models", type=Path, nargs="+", help="model directories; code in them is run"
    )
    options = parser.parse_args()
    for folder in options.models:
        if not (folder / "config.json").is_file():
            sys.exit(f"perplexity.py: {folder} has no config.json: name the directory of a model.")
    values = [perplexity(folder) for folder in options.models]
    for folder, (value, tokens) in zip(options.models, values, strict=True):
        print(f"{value:.6f} on {tokens} tokens: {folder}")
    first = values[0][0]
    if any(abs(value - first) > TOLERANCE for value, _ in values):
        sys.exit(f"perplexity.py: the values differ by more than {TOLERANCE}.")


def perplexity(folder: Path) -> tuple[float, int]:
    """``exp`` of the mean cross-entropy per predicted token in float32, and their number."""
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoTokenizer,
    )
    from transformers.utils import logging

    logging.disable_progress_bar()
    where: dict[str, Any] = {
        "pretrained_model_name_or_path": str(folder),
        "trust_remote_code": True,
        "local_files_only": True,
    }
    composed = hasattr(AutoConfig.from_pretrained(**where), "vision_config")
    kind = AutoModelForImageTextToText if composed else AutoModelForCausalLM
    model = kind.from_pretrained(**where, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(**where)(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    loss = torch.nn.functional.cross_entropy(logits[0, :-1].double(), ids[0, 1:])
    return float(loss.exp()), ids.shape[1] - 1


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped by SIGINT.")
