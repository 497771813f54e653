"""The data of a run, built from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.encode.encoding import Encoding
from moiie_megatron.data.encode.images import ImageDecoder, ImageLoader
from moiie_megatron.data.encode.templates import load_template
from moiie_megatron.data.encode.tokenizers import load_tokenizer
from moiie_megatron.data.packing.exchange_samples import DataParallelRanks
from moiie_megatron.data.packing.packed_loader import pack_steps, read_steps
from moiie_megatron.data.packing.rows import PackingSpec
from moiie_megatron.data.records.llava import RecordFile
from moiie_megatron.data.stream.batch import Batch, collate
from moiie_megatron.data.stream.dataset import LlavaDataset, Source
from moiie_megatron.data.stream.example import Example
from moiie_megatron.data.stream.loader import build_loader
from moiie_megatron.data.stream.settings import LoaderSettings
from moiie_megatron.data.stream.stream_state import StreamState
from moiie_megatron.families.registry import vision_family
from moiie_megatron.utils.errors import UserError

if TYPE_CHECKING:
    from moiie_megatron.data.stream.energon import EnergonDataset, EnergonStream


def build_sources(config: RunConfig) -> list[Source]:
    """The run's sources, opened.

    Raises:
        UserError: A file or directory is missing or unreadable.
    """
    sources = []
    for source in config.data.sources:
        assert source.images is not None  # checked with the configuration
        images = image_loader(config, source.images)
        sources.append(Source(RecordFile(source.records), images, source.weight, source.name or ""))
    return sources


def image_loader(config: RunConfig, directory: str) -> ImageLoader:
    """How the run reads the images of a directory.

    Raises:
        UserError: It is missing or unreadable.
    """
    return ImageLoader(
        Path(directory),
        config.vision.image_size,
        config.stage.image_mode,
        _mean(config),
        allow_outside=config.data.allow_outside_images,
    )


def _mean(config: RunConfig) -> tuple[float, float, float]:
    """The mean colour of the vision encoder's preprocessor."""
    return vision_family(config.vision.family).statistics.mean


def build_encoding(config: RunConfig) -> Encoding:
    """How the run turns records into token ids.

    Raises:
        UserError: The template does not fit the tokenizer, or the tokenizer has more ids than
            the model has embeddings.
    """
    tokenizer = load_tokenizer(
        config.data.tokenizer, config.data.image_token, config.data.markers_in_text
    )
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
            ImageDecoder(config.vision.image_size, config.stage.image_mode, _mean(config)),
        )
    return LlavaDataset(build_sources(config), encoding)


def build_train_loader(  # noqa: PLR0913  # what a run knows of its stream
    config: RunConfig,
    dataset: LlavaDataset | EnergonDataset,
    *,
    consumed_samples: int,
    dp_rank: int,
    dp_size: int,
    ranks: DataParallelRanks | None = None,
    pin_memory: bool = False,
    state: StreamState | None = None,
    is_stopping: Callable[[], bool] = bool,
) -> Iterator[list[Batch]]:
    """The endless stream of one data-parallel rank: the micro-batches of one step at a time.

    Under sequence parallelism, lengths are multiples of the tensor-parallel degree.

    Args:
        config: Checked against the number of ranks.
        dataset: That of ``build_dataset``.
        consumed_samples: Samples that earlier steps have used, on all ranks together.
        dp_rank: This data-parallel rank, from 0.
        dp_size: Number of data-parallel ranks.
        ranks: The data-parallel ranks, which share their samples with packing; needed if there
            are several.
        pin_memory: Put batches into pinned memory.
        state: Where an energon stream continues, and what it saves; the plain loader needs
            ``consumed_samples`` alone.
        is_stopping: Whether the run should stop; if so, it waits for its samples for a limited
            time.  Energon's loader waits for ever.
    """
    settings = LoaderSettings(
        seed=config.train.seed,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        consumed_samples=consumed_samples,
        num_workers=config.data.num_workers,
        pin_memory=pin_memory,
        max_skipped_fraction=config.data.max_skipped_fraction,
        is_stopping=is_stopping,
    )
    if config.data.packing:
        assert ranks is not None or dp_size == 1
        return pack_steps(
            read_steps(dataset, settings)
            if isinstance(dataset, LlavaDataset)
            else _energon_stream(config, dataset, replace(settings, pin_memory=False), list, state),
            packing_spec(config, dataset),
            ranks,
            rows_multiple_of=config.micro_batches_multiple_of,
            pin_memory=pin_memory,
        )
    make = batch_maker(config, dataset)
    if isinstance(dataset, LlavaDataset):
        micro_batches = build_loader(dataset, settings, make)
        return _group_by_step(micro_batches, settings.micro_batches_per_step)
    make_all = partial(_split_and_collate, size=settings.micro_batch_size, make=make)
    return iter(_energon_stream(config, dataset, settings, make_all, state))


def packing_spec(config: RunConfig, dataset: LlavaDataset | EnergonDataset) -> PackingSpec:
    """What all packed rows have in common."""
    return PackingSpec(
        capacity=config.micro_batch_shape[1],
        sequence_length=config.data.sequence_length,
        num_image_tokens=dataset.num_image_tokens,
        pad_id=dataset.pad_id,
        multiple_of=_length_multiple(config),
        pad_to_capacity=config.data.padding == "sequence_length",
    )


def batch_maker(
    config: RunConfig, dataset: LlavaDataset | EnergonDataset
) -> Callable[[Sequence[Example]], Batch]:
    """Makes a micro-batch of its samples, without packing."""
    pads_to_limit = config.data.padding == "sequence_length"
    return partial(
        collate,
        pad_id=dataset.pad_id,
        num_image_tokens=dataset.num_image_tokens,
        pad_to=config.data.sequence_length if pads_to_limit else None,
        multiple_of=_length_multiple(config),
    )


def _length_multiple(config: RunConfig) -> int:
    return config.parallel.tensor if config.parallel.sequence_parallel else 1


def _energon_stream(
    config: RunConfig,
    dataset: EnergonDataset,
    settings: LoaderSettings,
    make: Callable[[Sequence[Example]], list[Any]],
    state: StreamState | None,
) -> EnergonStream:
    # Imported here: an optional package.
    from moiie_megatron.data.stream.energon import EnergonStream

    blend_file = Path(config.output) / "energon_blend.yaml"
    return EnergonStream(
        dataset, settings, make, blend_file=blend_file, state=state or StreamState()
    )


def _split_and_collate(
    examples: Sequence[Example], size: int, make: Callable[[Sequence[Example]], Batch]
) -> list[Batch]:
    """The micro-batches of the samples of one rank in a step, ``size`` samples each."""
    return [make(examples[i : i + size]) for i in range(0, len(examples), size)]


def _group_by_step(micro_batches: Iterator[Batch], per_step: int) -> Iterator[list[Batch]]:
    """An endless stream of micro-batches as lists of ``per_step``."""
    while True:
        yield [next(micro_batches) for _ in range(per_step)]
