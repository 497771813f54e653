"""The data of a run from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.batch import Batch
from moiie_megatron.data.dataset import LlavaDataset, Source
from moiie_megatron.data.images import ImageLoader, pixel_statistics
from moiie_megatron.data.loader import build_loader
from moiie_megatron.data.packed_loader import build_packed_loader
from moiie_megatron.data.packing import RowShape
from moiie_megatron.data.records import RecordFile
from moiie_megatron.data.templates import load_template
from moiie_megatron.data.tokenizers import load_tokenizer


def build_dataset(config: RunConfig) -> LlavaDataset:
    """All samples of the run's sources, encoded with the stage's template.

    Raises:
        ValueError: A file is missing or unreadable, the template does not fit the tokenizer, or
            the tokenizer has more ids than the model has embeddings.
    """
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.image_token)
    if tokenizer.vocab_size > config.language.vocab_size:
        raise ValueError(
            f"data.tokenizer {config.data.tokenizer} has {tokenizer.vocab_size} ids but "
            f"language.vocab_size is {config.language.vocab_size}: use the backbone's tokenizer."
        )
    statistics = pixel_statistics(config.vision.family)
    sources = [
        Source(
            RecordFile(source.records),
            ImageLoader(
                Path(source.images),
                config.vision.image_size,
                config.stage.image_mode,
                statistics.mean,
                statistics.std,
            ),
        )
        for source in config.data.sources
    ]
    return LlavaDataset(
        sources,
        tokenizer,
        load_template(config.stage.template, tokenizer),
        config.vision.num_image_tokens,
        config.data.sequence_length,
    )


def build_train_loader(
    config: RunConfig,
    dataset: LlavaDataset,
    *,
    consumed_samples: int,
    dp_rank: int,
    dp_size: int,
    most: Callable[[int], int],
    pin_memory: bool = False,
) -> Iterator[list[Batch]]:
    """The endless stream of one data-parallel rank: the micro-batches of a step at a time.

    Lengths are multiples of the tensor-parallel degree under sequence parallelism.

    Args:
        most: The largest of the numbers that the data-parallel ranks call it with
            (``World.most``); with packing they agree on the micro-batches of a step.

    Raises:
        ValueError: The batch sizes or lengths do not fit the layout.
    """
    parallel, train = config.parallel, config.train
    multiple_of = parallel.tensor if parallel.sequence_parallel else 1
    full = config.data.padding == "sequence_length"
    options: dict[str, Any] = {
        "seed": train.seed,
        "consumed_samples": consumed_samples,
        "global_batch_size": train.global_batch_size,
        "micro_batch_size": train.micro_batch_size,
        "dp_rank": dp_rank,
        "dp_size": dp_size,
        "num_workers": config.data.num_workers,
        "pin_memory": pin_memory,
    }
    if config.data.packing:
        shape = RowShape(
            capacity=config.micro_batch_shape[1],
            sequence_length=config.data.sequence_length,
            num_image_tokens=dataset.num_image_tokens,
            pad_id=dataset.pad_id,
            multiple_of=multiple_of,
            full=full,
        )
        return build_packed_loader(dataset, shape, most=most, **options)
    pad_to = config.data.sequence_length if full else None
    stream = build_loader(dataset, pad_to=pad_to, multiple_of=multiple_of, **options)
    return _by_step(stream, train.global_batch_size // (train.micro_batch_size * dp_size))


def _by_step(stream: Iterator[Batch], micro_batches: int) -> Iterator[list[Batch]]:
    """An endless stream, so many at a time."""
    while True:
        yield [next(stream) for _ in range(micro_batches)]
