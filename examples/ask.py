"""Ask an exported model one question, with or without images.

Needs torch, transformers and pillow, not this project: the model's code is in its directory.

    python examples/ask.py runs/smollm2/export "What is the capital of France?"
    python examples/ask.py runs/smollm2/export "Which digits are these?" --image digits.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="exported directory; its code is run")
    parser.add_argument("question")
    parser.add_argument("--image", type=Path, action="append", default=[], help="may be repeated")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args()
    for path in (options.model / "config.json", *options.image):
        if not path.is_file():
            sys.exit(f"ask.py: {path} does not exist: name a file that does.")
    print(answer(options.model, options.question, options.image, options.max_new_tokens))


def answer(model_path: Path, question: str, images: list[Path], max_new_tokens: int) -> str:
    """The answer by greedy decoding."""
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    where: dict[str, Any] = {
        "pretrained_model_name_or_path": str(model_path),
        "trust_remote_code": True,
        "local_files_only": True,
    }
    processor = AutoProcessor.from_pretrained(**where)
    model = AutoModelForImageTextToText.from_pretrained(**where, dtype="auto").eval()
    pictures = [Image.open(file) for file in images]
    content: Any = [{"type": "image", "image": picture} for picture in pictures]
    content.append({"type": "text", "text": question})
    more: dict[str, Any] = {}
    if processor.image_token in question:  # it says itself where the images are
        content, more = question, {"images": pictures}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=more,
    )
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :]
    return str(processor.decode(new, skip_special_tokens=True)).strip()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped by SIGINT.")
