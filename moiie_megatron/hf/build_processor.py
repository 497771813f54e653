"""The processor of an export, from what a training run knows."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Literal

import transformers

from moiie_megatron.config.schema import VisionConfig
from moiie_megatron.data.vocabulary.fast_tokenizer import load_fast_tokenizer
from moiie_megatron.data.vocabulary.tokenizer_files import tokenizer_files
from moiie_megatron.families.registry import vision_family
from moiie_megatron.hf.processing_moiie import MoiieProcessor


def build_processor(
    tokenizer_directory: str | Path,
    vision: VisionConfig,
    image_mode: Literal["square", "pad"],
    image_token: str = "<image>",
    chat_template: str | None = None,
    stop_ids: Collection[int] = (),
) -> MoiieProcessor:
    """A processor that prepares text and images as the run's data side does.

    ``save_pretrained`` on the result writes tokenizer, chat template and ``processor_config.json``.

    Args:
        tokenizer_directory: As ``data.tokenizer``, and read by the same function.
        vision: Family and sizes of the vision encoder.
        image_mode: ``stage.image_mode`` of the run.
        image_token: ``data.image_token`` of the run.
        chat_template: Default: the tokenizer's.
        stop_ids: Tokens that end an answer; ``skip_special_tokens`` leaves them out of texts.
    """
    tokenizer = load_fast_tokenizer(tokenizer_files(tokenizer_directory), image_token)
    for stop in stop_ids:
        marker = tokenizer.added_tokens_decoder.get(stop)
        if marker is not None and not marker.special:
            marker.special = True
            tokenizer.add_tokens([marker], special_tokens=True)
    if chat_template is not None:
        tokenizer.chat_template = chat_template  # also where the tokenizer is loaded alone
    family = vision_family(vision.family)
    kind = getattr(transformers, family.image_processor)
    image_processor = kind(
        size={"height": vision.image_size, "width": vision.image_size},
        crop_size={"height": vision.image_size, "width": vision.image_size},
        do_center_crop=False,
        image_mean=list(family.statistics.mean),
        image_std=list(family.statistics.std),
    )
    return MoiieProcessor(
        image_processor,
        tokenizer,
        num_image_tokens=vision.num_image_tokens,
        image_mode=image_mode,
        image_token=image_token,
        chat_template=chat_template,
    )
