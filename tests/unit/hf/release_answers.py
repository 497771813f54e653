"""What exported models answer, in a process with transformers alone.

``python release_answers.py FOLDER PICTURES OUT`` loads every export below FOLDER and writes the new
ids of every case to the JSON file OUT.  The tests run it with several versions of transformers, and
call ``answers`` with the installed one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

STEPS = 8
PROMPTS = ("<s>what is <image>", "<s>compare <image> and <image> now", "<s>no picture here")
PICTURES = ((0,), (1, 2), ())
# Rows of a batch, and how they are generated.
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "one image": ((0,), {}),
    "two images": ((1,), {}),
    "no image": ((2,), {}),
    "batch": ((0, 1, 2), {}),
    "batch without cache": ((0, 1, 2), {"use_cache": False}),
    "batch with a cache of fixed size": ((0, 1, 2), {"cache_implementation": "static"}),
    "candidates": ((0,), {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}),
}


def inputs(processor: Any, pictures: Path, rows: tuple[int, ...]) -> dict[str, torch.Tensor]:
    images = [Image.open(pictures / f"{i}.png") for row in rows for i in PICTURES[row]]
    prompts = [PROMPTS[row] for row in rows]
    return dict(processor(text=prompts, images=images or None, padding=True, return_tensors="pt"))


def answers(export: Path, pictures: Path) -> dict[str, list[list[int]]]:
    """New ids by case."""
    trust = {"trust_remote_code": True}
    processor = AutoProcessor.from_pretrained(export, **trust)
    model, report = AutoModelForImageTextToText.from_pretrained(
        export, output_loading_info=True, **trust
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys")), report
    found = {}
    for name, (rows, settings) in CASES.items():
        given = inputs(processor, pictures, rows)
        ids = model.generate(
            **given, **settings, max_new_tokens=STEPS, do_sample=False, eos_token_id=None
        )
        found[name] = ids[:, given["input_ids"].shape[1] :].tolist()
    return found


def main() -> None:
    folder, pictures, out = (Path(argument) for argument in sys.argv[1:])
    torch.set_num_threads(1)
    found = {export.name: answers(export, pictures) for export in sorted(folder.iterdir())}
    out.write_text(json.dumps({"version": transformers.__version__, "answers": found}))


if __name__ == "__main__":
    main()
