"""The stream of megatron-energon (7.4): tar shards from disk or object storage.

Energon reads, blends and shuffles the shards and restores its state; samples are encoded, packed
and collated by the code of the plain loader.  Differences from the plain loader: samples of
several sources are drawn at random (weights hold on average), the order depends on the number of
ranks and workers, and each data-parallel rank has a state of its own.

A sample in a shard is ``KEY.json`` and its images (``data/records/webdataset.py``).
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from megatron.energon import (
    Batch,
    Cooker,
    DefaultTaskEncoder,
    NoCachePool,
    Sample,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_savable_loader,
    get_train_dataset,
    stateless,
)
from megatron.energon.epathlib import EPath
from megatron.energon.errors import FatalSampleError
from megatron.energon.flavors.webdataset.empty_dataset_error import (
    EmptyDatasetError,
)
from megatron.energon.flavors.webdataset.metadata import (
    WebdatasetMeta,
)

from moiie_megatron.data.encode.encoding import Encoding
from moiie_megatron.data.encode.images import ImageDecoder
from moiie_megatron.data.records.energon_index import DATASET_FILE
from moiie_megatron.data.records.parse import parse_record
from moiie_megatron.data.records.record import BadRecord
from moiie_megatron.data.stream.example import Example, SkippedSample, notices
from moiie_megatron.data.stream.flat_item import FlatItem, flatten
from moiie_megatron.data.stream.order import Blend
from moiie_megatron.data.stream.settings import LoaderSettings
from moiie_megatron.data.stream.stream_state import StreamState
from moiie_megatron.data.stream.worker import restore_sigchld, worker_failure
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.restricted_pickle import unpickle

_SHUFFLE_BUFFER = 1000  # samples per worker, still encoded: images are decoded after the shuffle
_RUN_LENGTH = 100  # consecutive samples read from one position of a shard
# Classes of energon's state, which a checkpoint holds for every data-parallel rank.
_STATE = frozenset(
    {
        ("megatron.energon.flavors.webdataset.sample_loader", "SliceState"),
        ("megatron.energon.rng", "SystemRngState"),
        ("megatron.energon.state", "FlexState"),
        ("megatron.energon.savable_loader", "SavableDataLoaderState"),
        ("megatron.energon.savable_loader", "SavableDatasetCheckpoint"),
        ("megatron.energon.savable_loader", "SavableDatasetState"),
    }
)
_STATE_EVERY_S = 10.0  # a resumed worker repeats at most the work of this time


class EnergonDataset:
    """The prepared shards of all sources.

    Args:
        sources: Directory (or ``msc://`` address) of the shards, weight and name of each source.
        encoding: Records to token ids.
        images: Image files to pixels.

    Raises:
        UserError: A directory holds no shards that energon has indexed.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str, float, str]],
        encoding: Encoding,
        images: ImageDecoder,
    ) -> None:
        self.sources = tuple(sources)
        self.encoding = encoding
        self.images = images
        self.blend = Blend.weighted(
            [_num_samples(path) for path, _, _ in sources], [weight for _, weight, _ in sources]
        )

    @property
    def num_image_tokens(self) -> int:
        return self.encoding.num_image_tokens

    @property
    def pad_id(self) -> int:
        return self.encoding.tokenizer.pad_id

    def describe_epoch(self) -> str:
        """One line for the log: the samples of every source in an epoch, on average."""
        names = [name or Path(path).name for path, _, name in self.sources]
        return self.blend.describe_epoch(names) + " (energon draws them at random)"

    def write_blend(self, path: Path) -> None:
        """Write energon's description of the blend (a MetadatasetV2)."""
        parts = [
            {"weight": count, "path": source if "://" in source else str(Path(source).absolute())}
            for count, (source, _, _) in zip(self.blend.counts, self.sources, strict=True)
        ]
        content = {
            "__module__": "megatron.energon",
            "__class__": "MetadatasetV2",
            "splits": {"train": {"blend": parts}},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        # Every rank writes the same content, so each needs its own temporary file.
        beside = path.with_name(f"{path.name}.writing{os.getpid()}")
        beside.write_text(yaml.safe_dump(content, sort_keys=False))
        os.replace(beside, path)


class EnergonStream:
    """The endless stream of one data-parallel rank, one step at a time.

    Args:
        dataset: The shards.
        settings: Batch sizes, rank and seed.
        make: From the samples of this rank in a step to what the stream yields, in the worker:
            their micro-batches, or samples (which are not pinned).
        blend_file: Where the description of the blend is written.
        state: Where to continue; saves the state of this stream from now on.

    Raises:
        UserError: While iterating: too many samples in a row were skipped.
    """

    def __init__(
        self,
        dataset: EnergonDataset,
        settings: LoaderSettings,
        make: Callable[[Sequence[Example]], list[Any]],
        *,
        blend_file: Path,
        state: StreamState,
    ) -> None:
        dataset.write_blend(blend_file)
        encoder = _TaskEncoder(dataset.encoding, dataset.images, make)
        workers = WorkerConfig(
            rank=settings.dp_rank,
            world_size=settings.dp_size,
            num_workers=settings.num_workers,
            seed_offset=settings.seed,
            global_error_handler=encoder.note_skipped,
        )
        shards = get_train_dataset(
            str(blend_file.absolute()),
            worker_config=workers,
            batch_size=settings.samples_per_step,
            shuffle_buffer_size=_SHUFFLE_BUFFER,
            max_samples_per_sequence=_RUN_LENGTH,
            task_encoder=encoder,
        )
        self._loader = get_savable_loader(
            shards, checkpoint_every_sec=_STATE_EVERY_S, cache_pool=NoCachePool()
        )
        if state.restored is not None:
            restored = unpickle(state.restored, _STATE, "energon's state in the checkpoint")
            self._loader.restore_state_rank(restored)
        state.attach(self)
        self._pin_memory = settings.pin_memory

    def state_bytes(self) -> bytes:
        """Energon's state of this rank, pickled."""
        return pickle.dumps(self._loader.save_state_rank())

    def __iter__(self) -> Iterator[list[Any]]:
        before = signal.getsignal(signal.SIGCHLD)
        # Closed here: workers that the garbage collector has to end block for seconds.
        try:
            with closing(iter(self._loader)) as steps:
                for step in steps:
                    restore_sigchld(before)
                    made = step.made.restore()
                    yield [one.pin_memory() for one in made] if self._pin_memory else made
        except (FatalSampleError, RuntimeError, OSError, EOFError) as error:
            reason = _bad_record(error) if isinstance(error, FatalSampleError) else None
            if reason is None:
                if (failure := worker_failure(error)) is not None:
                    raise failure from error
                raise
            raise UserError(
                "Stopping: too many samples in a row could not be read, so the shards, the "
                f"template or the tokenizer must be wrong; last: {reason}."
            ) from error


@edataclass
class _RawSample(Sample):
    record: bytes
    images: list[tuple[str, bytes]]


@edataclass
class _EncodedSample(Sample):
    example: Example


@edataclass
class _Step(Batch):
    """What was made of the samples of one rank in a step, as one flat item."""

    made: FlatItem


@stateless
def _cook(sample: dict[str, Any]) -> _RawSample:
    """The files of a sample; images ordered by their numbers."""
    files = {name: content for name, content in sample.items() if not name.startswith("__")}
    record = files.pop("json", b"")

    def number(name: str) -> int:
        return int(found[0]) if (found := re.findall(r"^\d+", name)) else 0

    images = [(name, files[name]) for name in sorted(files, key=number)]
    return _RawSample(**basic_sample_keys(sample), record=record, images=images)


class _TaskEncoder(DefaultTaskEncoder):
    """Energon's hooks, which call the plain loader's functions."""

    decoder = None  # files stay bytes in the shuffle buffer; encode_sample decodes them
    cookers = [Cooker(_cook)]

    def __init__(
        self,
        encoding: Encoding,
        images: ImageDecoder,
        make: Callable[[Sequence[Example]], list[Any]],
    ) -> None:
        super().__init__()
        self._encoding = encoding
        self._images = images
        self._make = make
        self._skipped: list[SkippedSample] = []  # since the last step of this worker

    @stateless
    def encode_sample(self, sample: _RawSample) -> _EncodedSample:
        if not sample.record:
            found = ", ".join(f"{sample.__key__}.{name}" for name, _ in sample.images[:2])
            raise BadRecord(
                f"the sample {sample.__key__} has {found or 'no file'} but no "
                f"{sample.__key__}.json: the name of a sample ends at the first dot"
            )
        try:
            value = json.loads(sample.record)
        except (ValueError, RecursionError) as error:
            raise BadRecord(f"not valid JSON ({error})") from error
        names = [name for name, _ in sample.images]
        record = parse_record(_with_images(value, names), default_id=sample.__key__)
        if len(record.images) != len(sample.images):
            raise BadRecord(
                f"the record names {len(record.images)} images, the shard has {len(sample.images)}"
            )
        encoded = self._encoding.encode(record)
        images = self._images.decode_all(
            (io.BytesIO(file), path)
            for path, (_, file) in zip(record.images, sample.images, strict=True)
        )
        told = notices(record, encoded, "data.sources")  # energon does not say which one
        example = Example(encoded, images, record.id, notices=told)
        return _EncodedSample.derive_from(sample, example=example)

    @stateless
    def batch(self, samples: list[_EncodedSample]) -> _Step:
        first, *others = [sample.example for sample in samples]
        skipped_samples, self._skipped = tuple(self._skipped), []
        made = self._make([replace(first, skipped_samples=skipped_samples), *others])
        return _Step(
            __key__=[sample.__key__ for sample in samples],
            __restore_key__=(),
            made=flatten(made),
        )

    def note_skipped(self, error: Exception, sample: Any, sources: Any) -> None:
        """Energon calls this, in the worker, for every sample that it would skip.

        Raises:
            Exception: ``error`` itself if it is a bug, not a bad record.
        """
        if not isinstance(error, BadRecord):
            raise error
        found = sources[0] if sources else None
        file = f"{found.dataset_path}/{found.shard_name}" if found else "a shard"
        # The key of the sample, which our shards take from the number of the record.
        key = found.file_names[0].split(".")[0] if found and found.file_names else ""
        index = int(key) if key.isdecimal() else -1
        self._skipped.append(SkippedSample(file, index, str(error)))


def _with_images(value: Any, names: Sequence[str]) -> Any:
    """The record, with the names of the shard's images if it names none itself.

    So do the shards of Megatron's own LLaVA example, whose records are lists of turns.
    """
    if isinstance(value, list):
        return {"conversations": value, "images": list(names)}
    if isinstance(value, dict) and not value.get("image") and not value.get("images"):
        return {**value, "images": list(names)}
    return value


def _bad_record(error: BaseException | None) -> str | None:
    """The bad record for which energon has stopped; None if it stopped for another reason."""
    while error is not None:
        if isinstance(error, BadRecord):
            return str(error)
        # A worker's error arrives as the text of its traceback.
        if found := re.findall(r"BadRecord: (.*)", str(error)):
            return str(found[-1])
        error = error.__cause__ or error.__context__
    return None


def _num_samples(path: str) -> int:
    """Number of samples in the training part of the shards at ``path``, from energon's index.

    Raises:
        UserError: There is no index, or one for samples of another kind.
    """
    directory = EPath(path if "://" in path else str(Path(path).absolute()))
    _check_kind(directory)
    try:
        meta = WebdatasetMeta.from_config(directory, split_part="train")
    except (ValueError, OSError, EmptyDatasetError) as error:
        raise UserError(
            f"{path} holds no shards with energon's index ({error}): make them with "
            "tools/prepare_data.py webdataset where megatron-energon is installed, or run energon "
            "prepare --split-ratio 1,0,0 there."
        ) from error
    return sum(shard.count for shard in meta.shards)


def _check_kind(directory: EPath) -> None:
    """Check that energon hands out samples as they are in the shards."""
    try:
        with (directory / DATASET_FILE).open("r") as file:
            kind = yaml.safe_load(file)["__class__"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return  # not prepared, which opening the shards reports
    if kind not in ("CrudeWebdataset", "CrudeWebdatasetFactory"):
        raise UserError(
            f"{directory} was prepared as {kind}, which holds one question and answer where a "
            "record may have more: run energon prepare --non-interactive --force-overwrite "
            f"--split-ratio 1,0,0 --sample-type CrudeWebdataset {directory}, which leaves the "
            "shards as they are."
        )
