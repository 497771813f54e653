"""Makes what the tests compare vLLM with: exports, questions, and transformers' answers.

python material.py RUN OUT      in the environment of moiie_megatron

RUN is the output directory of tools/demo.py.  OUT gets a directory for each export, ``NAME/``, and
``NAME.json``: for each question the ids of the prompt, the greedy answer with the log-probability
of each token, and the same if all tokens were routed as text.  ``prompts/`` gets the table of
templates and tokenizers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from questions import Messages, num_images, write_questions
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText, AutoProcessor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # tests.helpers
EXPERTS = {
    "dense": {},
    "vanilla": {"shared": 4},
    "modality": {"vision": 2, "text": 2},
    "moiie": {"vision": 1, "shared": 2, "text": 1},
}
# A trained model hardly changes its answers with the modality of its tokens, a random one does.
STD = 0.12
RANDOM_ANSWER, DEMO_ANSWER = 16, 8  # tokens
# A window shorter than the prompts, and both orders of tied and separate embeddings.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "phi3": {"model_type": "phi3", "sliding_window": 24, "tie_word_embeddings": False},
}
TOWERS = {"llama": "siglip_vision_model", "phi3": "clip_vision_model"}


def main() -> None:
    run, out = map(Path, sys.argv[1:])
    questions = write_questions(run / "data")
    export = out / "demo"
    command = [sys.executable, str(ROOT / "tools/convert.py"), "export"]
    subprocess.run([*command, "--ckpt", str(run / "stage2"), "--out", str(export)], check=True)
    write_answers(export, questions, DEMO_ANSWER)
    write_prompts(out / "prompts")
    for family in FAMILIES:
        for variant in EXPERTS:
            folder = out / f"{family}-{variant}"
            write_random(export, folder, family, variant)
            write_answers(folder, some(questions), RANDOM_ANSWER)


def write_prompts(folder: Path) -> None:
    """Conversations in templates and tokenizers, and the ids that training gives them."""
    from tests.helpers.same_ids import TEMPLATES, write_cases

    for kind in ("llama3", "qwen", "llama2", "phi3-rstrip", "model-decoder"):
        write_cases(folder / kind, [kind], TEMPLATES if kind == "llama3" else ("phi3", "chatml"))


def some(questions: list[Messages]) -> list[Messages]:
    """20 of the 50: 12 with one picture, 4 with several, 4 without."""
    by_images: dict[int, list[Messages]] = {0: [], 1: [], 2: []}
    for messages in questions:
        by_images[min(num_images(messages), 2)].append(messages)
    return by_images[1][::3] + by_images[2][:4] + by_images[0][:4]


def write_random(export: Path, folder: Path, family: str, variant: str) -> None:
    """An export of the same sizes with random weights, in the form that an export has."""
    config = AutoConfig.from_pretrained(export, trust_remote_code=True)
    values = config.to_dict()
    text = values["text_config"] | FAMILIES[family]
    vision = values["vision_config"] | {"model_type": TOWERS[family]}
    changed = {
        "text_config": CONFIG_MAPPING[text.pop("model_type")](**text),
        "vision_config": CONFIG_MAPPING[vision.pop("model_type")](**vision),
        "experts": EXPERTS[variant],
        "moe_layers": [1, 3] if variant != "dense" else [],
        "tie_word_embeddings": None,
    }
    keep = ("image_token_id", "num_image_tokens", "vision_feature_layer", "eos_token_id")
    if variant == "modality":  # as where the image token has no trained row
        changed["num_added_tokens"] = 1
    kept = {key: getattr(config, key) for key in (*keep, "bos_token_id", "pad_token_id")}
    torch.manual_seed(len(variant))
    model = AutoModelForImageTextToText.from_config(
        type(config)(**kept, **changed, architectures=config.architectures),
        trust_remote_code=True,
    )
    randomise(model)
    model.generation_config.eos_token_id = config.eos_token_id
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(export, trust_remote_code=True).save_pretrained(folder)
    auto_map = json.loads((export / "config.json").read_text())["auto_map"]
    for name in ("config.json", "processor_config.json"):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": auto_map}))
    for file in export.glob("*_moiie.py"):
        (folder / file.name).write_bytes(file.read_bytes())


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Weights and biases around 0, those of norms around 1."""
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=STD)
        if "norm" in name and name.endswith("weight"):
            parameter += 1


def write_answers(folder: Path, questions: list[Messages], longest: int) -> None:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    rows = []
    for messages in questions:
        inputs = processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        rows.append(
            {
                "messages": messages,
                "prompt": inputs["input_ids"][0].tolist(),
                "answer": generated(model, inputs, longest),
                "as_text": greedy(text_routed(model, inputs), stops(model), longest),
            }
        )
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    folder.with_suffix(".json").write_text(json.dumps(versions | {"rows": rows}))


def stops(model: Any) -> list[int]:
    return model.generation_config.eos_token_id


def generated(model: Any, inputs: Any, longest: int) -> dict[str, list[Any]]:
    """``generate``'s greedy answer, with its cache."""
    output = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=longest,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    steps = zip(tokens, output.logits, strict=True)
    return {
        "tokens": tokens,
        "logprobs": [logits[0].log_softmax(-1)[token].item() for token, logits in steps],
    }


@torch.no_grad()
def text_routed(model: Any, inputs: Any) -> Callable[[list[int]], Tensor]:
    """A function from new tokens to the logits of the next one, all tokens being text.

    Images stay where they are: only their tokens' router is another one.
    """
    ids = inputs["input_ids"]
    types = inputs["mm_token_type_ids"]
    embed = model.get_input_embeddings()
    embeds = embed(ids)
    if "pixel_values" in inputs:
        images = model.get_image_features(inputs["pixel_values"]).pooler_output
        embeds[types == 1] = torch.cat(list(images))

    @torch.no_grad()
    def logits(tokens: list[int]) -> Tensor:
        new = embed(torch.tensor([tokens], dtype=torch.long))
        whole = torch.cat([embeds, new], dim=1)
        flipped = torch.zeros(whole.shape[:2], dtype=torch.long)
        return model(inputs_embeds=whole, mm_token_type_ids=flipped, use_cache=False).logits[0, -1]

    return logits


def greedy(
    logits: Callable[[list[int]], Tensor], stop: list[int], longest: int
) -> dict[str, list[Any]]:
    tokens: list[int] = []
    logprobs: list[float] = []
    while len(tokens) < longest and not (tokens and tokens[-1] in stop):
        scores = logits(tokens).log_softmax(-1)
        tokens.append(int(scores.argmax()))
        logprobs.append(scores[tokens[-1]].item())
    return {"tokens": tokens, "logprobs": logprobs}


if __name__ == "__main__":
    main()
