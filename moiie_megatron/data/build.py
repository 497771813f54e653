"""The data of a run from its configuration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.batch import Batch
from moiie_megatron.data.dataset import LlavaDataset, Source
from moiie_megatron.data.images import ImageLoader, pixel_statistics
from moiie_megatron.data.loader import build_loader
from moiie_megatron.data.records import RecordFile
from moiie_megatron.data.survey import Encoding
from moiie_megatron.data.templates import load_template
from moiie_megatron.data.tokenizers import load_tokenizer


def build_sources(config: RunConfig) -> list[Source]:
    """The run's sources, opened.

    Raises:
        ValueError: A file or folder is missing or unreadable.
    """
    statistics = pixel_statistics(config.vision.family)
    return [
        Source(
            RecordFile(source.records),
            ImageLoader(
                Path(source.images),
                config.vision.image_size,
                config.stage.image_mode,
                statistics.mean,
                statistics.std,
            ),
            source.weight,
            source.name or "",
        )
        for source in config.data.sources
    ]


def build_encoding(config: RunConfig) -> Encoding:
    """How the run turns records into tokens.

    Raises:
        ValueError: The template does not fit the tokenizer, or the tokenizer has more ids than
            the model has embeddings.
    """
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.image_token)
    if tokenizer.vocab_size > config.language.vocab_size:
        raise ValueError(
            f"data.tokenizer {config.data.tokenizer} has {tokenizer.vocab_size} ids but "
            f"language.vocab_size is {config.language.vocab_size}: use the backbone's tokenizer."
        )
    return Encoding(
        tokenizer,
        load_template(config.stage.template, tokenizer),
        config.vision.num_image_tokens,
        config.data.sequence_length,
    )


def build_dataset(config: RunConfig) -> LlavaDataset:
    """All samples of the run's sources, encoded with the stage's template.

    Raises:
        ValueError: See ``build_sources`` and ``build_encoding``.
    """
    encoding = build_encoding(config)
    return LlavaDataset(
        build_sources(config),
        encoding.tokenizer,
        encoding.template,
        encoding.num_image_tokens,
        encoding.sequence_length,
    )


def build_train_loader(
    config: RunConfig,
    dataset: LlavaDataset,
    *,
    consumed_samples: int,
    dp_rank: int,
    dp_size: int,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """The endless stream of one data-parallel rank.

    Lengths are multiples of the tensor-parallel degree under sequence parallelism.

    Raises:
        ValueError: The batch sizes or lengths do not fit the layout.
    """
    parallel = config.parallel
    return build_loader(
        dataset,
        seed=config.train.seed,
        consumed_samples=consumed_samples,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        pad_to=config.data.sequence_length if config.data.padding == "sequence_length" else None,
        multiple_of=parallel.tensor if parallel.sequence_parallel else 1,
        num_workers=config.data.num_workers,
        pin_memory=pin_memory,
    )
