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
    content = f"{processor.image_token}\n" * len(images) + question
    prompt = content
    if processor.chat_template is not None:
        messages = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(
        text=prompt,
        images=[Image.open(file) for file in images] or None,
        add_special_tokens=processor.chat_template is None,  # a template writes them itself
        return_tensors="pt",
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
