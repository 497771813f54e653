"""Compare the logits of two models on disk, in fp32, in one process, on the CPU.

A Hugging Face directory runs in transformers (an exported one with the code that it contains), a
Megatron checkpoint in this project's model, so that a conversion is tested end to end.  The
inputs are random token ids and pixels of a fixed seed: no tokenizer, no data.

Shapes: b rows, s positions, p image tokens per image, S pixels per side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moiie_megatron.checkpoint.load_weights import load_weights
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.convert.open_model import Weights
from moiie_megatron.generation.checkpoint_config import checkpoint_config
from moiie_megatron.layout.token_types import IMAGE, TEXT
from moiie_megatron.mcore.dist_env import DistEnv
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.mcore.run import run_distributed
from moiie_megatron.utils.errors import UserError
from moiie_megatron.vlm.build import build_model
from moiie_megatron.vlm.image_split import images_of_rank

_SEED = 20
_ROWS = 2
_TEXT_TOKENS = 32
_BEFORE_IMAGE = 3  # text tokens


@dataclass(frozen=True)
class Inputs:
    """One input of both models.

    Args:
        name: Shown in the result.
        tokens: int64 ``(b, s)``, text ids at every position.
        is_image: bool ``(b, s)``.
        images: Normalised fp32 ``(b, 3, S, S)``; None for text alone.
    """

    name: str
    tokens: Tensor
    is_image: Tensor
    images: Tensor | None


@dataclass(frozen=True)
class LogitDifference:
    """The difference of two models' logits for one input.

    Args:
        name: Of the input.
        positions: Tokens in it.
        mean: Mean absolute difference.
        maximum: Largest absolute difference.
        top1: Fraction (0..1) of positions with the same most likely token.
    """

    name: str
    positions: int
    mean: float
    maximum: float
    top1: float

    def line(self) -> str:
        """One line of text."""
        return (
            f"logits, {self.name}: {self.positions} positions, |difference| mean {self.mean:.3e} "
            f"max {self.maximum:.3e}, top-1 agreement {100 * self.top1:.2f} %"
        )


def compare_logits(a: Weights, b: Weights) -> tuple[list[LogitDifference], list[str]]:
    """Run both models on text, and on an image with text where both have a vision tower.

    One model is in memory at a time, in fp32.

    Returns:
        The differences, and a sentence about each input that was skipped.

    Raises:
        UserError: A model that cannot be loaded.
    """
    inputs, skipped = make_inputs(a, b)
    of_a, of_b = logits(a, inputs), logits(b, inputs)
    vocabulary = min(a.language.vocab_size, b.language.vocab_size)
    differences = [
        _difference(given.name, x[..., :vocabulary], y[..., :vocabulary])
        for given, x, y in zip(inputs, of_a, of_b, strict=True)
    ]
    return differences, skipped


def make_inputs(a: Weights, b: Weights) -> tuple[list[Inputs], list[str]]:
    """Inputs that both models accept, and a sentence about each one that was skipped."""
    generator = torch.Generator().manual_seed(_SEED)
    positions = min(w.language.max_position_embeddings for w in (a, b))
    vocabulary = min(w.language.vocab_size for w in (a, b))
    image_ids = {w.image_token_id for w in (a, b)}
    ids = torch.tensor([token for token in range(vocabulary) if token not in image_ids])

    def text(rows: int, length: int) -> Tensor:
        return ids[torch.randint(len(ids), (rows, length), generator=generator)]

    tokens = text(_ROWS, min(_TEXT_TOKENS, positions))
    inputs = [Inputs("text", tokens, torch.zeros_like(tokens, dtype=torch.bool), None)]
    reason = _no_image(a, b, positions)
    if reason is not None:
        return inputs, [f"logits, image + text: skipped, {reason}"]
    assert a.vision is not None
    count, side = a.vision.num_image_tokens, a.vision.image_size
    tokens = text(1, min(count + _TEXT_TOKENS, positions))
    is_image = torch.zeros_like(tokens, dtype=torch.bool)
    start = min(_BEFORE_IMAGE, tokens.shape[1] - count - 1)
    is_image[:, start : start + count] = True
    images = torch.rand(1, 3, side, side, generator=generator) * 2 - 1
    return [*inputs, Inputs("image + text", tokens, is_image, images)], []


def logits(weights: Weights, inputs: Sequence[Inputs]) -> list[Tensor]:
    """Logits ``(b, s, vocabulary)`` in fp32 for each input.

    Raises:
        UserError: The model cannot be loaded.
    """
    run = _megatron_logits if weights.is_megatron else _hf_logits
    return run(weights, inputs)


def _no_image(a: Weights, b: Weights, positions: int) -> str | None:
    for name, weights in (("A", a), ("B", b)):
        if weights.vision is None:
            return f"{name} is a language model alone"
    assert a.vision is not None and b.vision is not None
    sizes = [(v.image_size, v.num_image_tokens) for v in (a.vision, b.vision)]
    if sizes[0] != sizes[1]:
        return f"images have {sizes[0]} pixels per side and tokens in A and {sizes[1]} in B"
    if a.vision.num_image_tokens >= positions:
        return f"an image has {sizes[0][1]} tokens but there are {positions} positions"
    return None


def _megatron_logits(weights: Weights, inputs: Sequence[Inputs]) -> list[Tensor]:
    config = checkpoint_config(weights.folder, ["train.precision=fp32", "train.device=cpu"])
    results: list[Tensor] = []

    def body(context: ParallelContext) -> None:
        results.extend(megatron_logits(weights.folder, config, context, inputs))

    run_distributed(config, DistEnv(), body)
    return results


@torch.no_grad()
def megatron_logits(
    checkpoint: Path, config: RunConfig, context: ParallelContext, inputs: Sequence[Inputs]
) -> list[Tensor]:
    """Logits ``(b, s, vocabulary)`` in fp32, on the CPU, of a checkpoint in this project's model.

    Every rank calls this and gets the same; pipeline parallelism is not supported.

    Raises:
        UserError: The checkpoint cannot be loaded.
    """
    device = context.device.torch_device
    model = build_model(config, context).eval()
    load_weights(checkpoint, context, model)
    results = []
    for given in inputs:
        tokens = given.tokens.to(device)
        positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        types = torch.where(given.is_image, IMAGE, TEXT).to(device, torch.int8)
        images = given.images
        if images is not None:
            images = images[images_of_rank(len(images), context.groups.tp)].to(device)
        results.append(model(tokens, positions, types, images).float().cpu())
    return results


@torch.no_grad()
def _hf_logits(weights: Weights, inputs: Sequence[Inputs]) -> list[Tensor]:
    model = _hf_model(weights)
    results = []
    for given in inputs:
        tokens = given.tokens
        extra: dict[str, Tensor] = {}
        if given.images is not None:
            assert weights.image_token_id is not None  # it has a vision tower
            tokens = torch.where(given.is_image, weights.image_token_id, tokens)
            extra["pixel_values"] = given.images
        results.append(model(input_ids=tokens, use_cache=False, **extra).logits.float())
    return results


def _hf_model(weights: Weights) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()
    kind = AutoModelForCausalLM if weights.vision is None else AutoModelForImageTextToText
    try:
        model, report = kind.from_pretrained(
            weights.folder,
            dtype=torch.float32,
            trust_remote_code=weights.is_moiie,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers and the code of a directory raise many types
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"transformers cannot load {weights.folder} ({lines[0].rstrip('.')}): repair the "
            "directory, or compare tensors alone with --no-logits."
        ) from error
    if report["missing_keys"]:
        name = sorted(report["missing_keys"])[0]
        raise UserError(
            f"transformers finds {len(report['missing_keys'])} weights missing in "
            f"{weights.folder}, {name} first: export the model again."
        )
    return model.eval()


def _difference(name: str, x: Tensor, y: Tensor) -> LogitDifference:
    apart = (x - y).abs()
    same = (x.argmax(-1) == y.argmax(-1)).float().mean().item()
    positions = x.shape[0] * x.shape[1]
    return LogitDifference(name, positions, apart.mean().item(), apart.max().item(), same)
