"""The data of a run from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.audit.audit import Encoding
from moiie_megatron.data.encode.images import ImageDecoder, ImageLoader
from moiie_megatron.data.encode.templates import load_template
from moiie_megatron.data.encode.tokenizers import load_tokenizer
from moiie_megatron.data.records.llava import RecordFile
from moiie_megatron.data.stream.batch import Batch, collate
from moiie_megatron.data.stream.dataset import LlavaDataset, Source
from moiie_megatron.data.stream.example import Example
from moiie_megatron.data.stream.loader import build_loader
from moiie_megatron.data.stream.packed_loader import build_packed_loader
from moiie_megatron.data.stream.packing import PackingSpec, pack, split_rows_to_count
from moiie_megatron.data.stream.stream_state import StreamState
from moiie_megatron.families.registry import vision_family
from moiie_megatron.utils.errors import UserError

if TYPE_CHECKING:
    from moiie_megatron.data.stream.energon import EnergonDataset


def build_sources(config: RunConfig) -> list[Source]:
    """The run's sources, opened.

    Raises:
        UserError: A file or folder is missing or unreadable.
    """
    sources = []
    for source in config.data.sources:
        assert source.images is not None  # checked with the configuration
        images = ImageLoader(Path(source.images), *_image_options(config))
        sources.append(Source(RecordFile(source.records), images, source.weight, source.name or ""))
    return sources


def _image_options(config: RunConfig) -> tuple[Any, ...]:
    """The arguments of ``ImageDecoder``."""
    statistics = vision_family(config.vision.family).statistics
    size, mode = config.vision.image_size, config.stage.image_mode
    return size, mode, statistics.mean, statistics.std


def build_encoding(config: RunConfig) -> Encoding:
    """How the run turns records into tokens.

    Raises:
        UserError: The template does not fit the tokenizer, or the tokenizer has more ids than
            the model has embeddings.
    """
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.image_token)
    if tokenizer.vocab_size > config.language.vocab_size:
        raise UserError(
            f"data.tokenizer {config.data.tokenizer} has {tokenizer.vocab_size} ids but "
            f"language.vocab_size is {config.language.vocab_size}: use the backbone's tokenizer."
        )
    return Encoding(
        tokenizer,
        load_template(config.stage.template, tokenizer),
        config.vision.num_image_tokens,
        config.data.sequence_length,
    )


def build_dataset(config: RunConfig) -> LlavaDataset | EnergonDataset:
    """All samples of the run's sources, encoded with the stage's template.

    Raises:
        UserError: See ``build_sources`` and ``build_encoding``; or the shards have no index.
    """
    encoding = build_encoding(config)
    if config.data.loader == "energon":
        # Imported here: an optional package.
        from moiie_megatron.data.stream.energon import EnergonDataset

        return EnergonDataset(
            [(source.records, source.weight, source.name or "") for source in config.data.sources],
            encoding,
            ImageDecoder(*_image_options(config)),
            config.data.num_workers,
        )
    return LlavaDataset(
        build_sources(config),
        encoding.tokenizer,
        encoding.template,
        encoding.num_image_tokens,
        encoding.sequence_length,
    )


def build_train_loader(
    config: RunConfig,
    dataset: LlavaDataset | EnergonDataset,
    *,
    consumed_samples: int,
    dp_rank: int,
    dp_size: int,
    most: Callable[[int], int],
    pin_memory: bool = False,
    state: StreamState | None = None,
) -> Iterator[list[Batch]]:
    """The endless stream of one data-parallel rank: the micro-batches of a step at a time.

    Lengths are multiples of the tensor-parallel degree under sequence parallelism.

    Args:
        most: The largest of the numbers that the data-parallel ranks call it with
            (``ParallelContext.most``); with packing they agree on the micro-batches of a step.
        state: Where a stream of energon goes on, and what it has to save; the plain loader needs
            ``consumed_samples`` alone.

    Raises:
        UserError: The batch sizes or lengths do not fit the layout.
    """
    parallel, train = config.parallel, config.train
    full = config.data.padding == "sequence_length"
    multiple_of = parallel.tensor if parallel.sequence_parallel else 1
    shape = PackingSpec(
        capacity=config.micro_batch_shape[1],
        sequence_length=config.data.sequence_length,
        num_image_tokens=dataset.num_image_tokens,
        pad_id=dataset.pad_id,
        multiple_of=multiple_of,
        full=full,
    )
    pad_to = config.data.sequence_length if full else None
    if not isinstance(dataset, LlavaDataset):
        from moiie_megatron.data.stream.energon import EnergonStream

        unpacked = partial(
            _micro_batches,
            size=train.micro_batch_size,
            pad_id=dataset.pad_id,
            num_image_tokens=dataset.num_image_tokens,
            pad_to=pad_to,
            multiple_of=multiple_of,
        )
        shares = EnergonStream(
            dataset,
            partial(pack, shape=shape) if config.data.packing else unpacked,
            blend_file=Path(config.output) / "energon_blend.yaml",
            samples=train.global_batch_size // dp_size,
            seed=train.seed,
            dp_rank=dp_rank,
            dp_size=dp_size,
            pin_memory=pin_memory,
            state=state or StreamState(),
        )
        if not config.data.packing:
            return iter(shares)
        return (split_rows_to_count(rows, most(len(rows)), shape) for rows in shares)
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
        return build_packed_loader(dataset, shape, most=most, **options)
    stream = build_loader(dataset, pad_to=pad_to, multiple_of=multiple_of, **options)
    return _by_step(stream, train.global_batch_size // (train.micro_batch_size * dp_size))


def _micro_batches(examples: Sequence[Example], size: int, **options: Any) -> list[Batch]:
    """A share of a step, ``size`` samples in each micro-batch."""
    return [collate(examples[i : i + size], **options) for i in range(0, len(examples), size)]


def _by_step(stream: Iterator[Batch], micro_batches: int) -> Iterator[list[Batch]]:
    """An endless stream, so many at a time."""
    while True:
        yield [next(stream) for _ in range(micro_batches)]
