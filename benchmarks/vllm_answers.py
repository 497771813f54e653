"""Answers of vLLM to questions about images, for ``consumers.py``; needs vLLM, and no project.

    PYTHONPATH=serving python benchmarks/vllm_answers.py EXPORT --records FILE --images DIR \
        --answers FILE

The engine runs in this process, in fp32.  Records are LLaVA's; the last turn is left out.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from PIL import Image

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def conversation(record: dict[str, Any], images: Path) -> list[dict[str, Any]]:
    """Messages with a picture for every placeholder."""
    names = record.get("image") or []
    pictures = iter([names] if isinstance(names, str) else names)
    messages = []
    for turn in record["conversations"][:-1]:
        first, *others = turn["value"].split("<image>\n")
        content: list[dict[str, Any]] = [{"type": "text", "text": first}] if first else []
        for text in others:
            picture = Image.open(images / next(pictures))
            content.append({"type": "image_pil", "image_pil": picture})
            content.append({"type": "text", "text": text})
        messages.append({"role": ROLES[turn["from"]], "content": content})
    return messages


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("export")
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    options = parser.parse_args()
    os.environ |= SETTINGS

    import moiie_vllm
    from vllm import LLM, SamplingParams

    moiie_vllm.register()
    lines = options.records.read_text(encoding="utf-8").splitlines()[: options.limit]
    records = [json.loads(line) for line in lines]
    llm = LLM(
        options.export,
        trust_remote_code=True,
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        max_num_seqs=32,
        limit_mm_per_prompt={"image": 4},
    )
    outputs = llm.chat(
        [conversation(record, options.images) for record in records],
        SamplingParams(temperature=0, max_tokens=options.max_new_tokens),
        use_tqdm=False,
    )
    with options.answers.open("w") as file:
        for record, output in zip(records, outputs, strict=True):
            text = output.outputs[0].text.strip()
            file.write(json.dumps({"question_id": record["id"], "text": text}) + "\n")
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
