"""The stream of megatron-energon (7.4): tar shards from disk or object storage.

Shards and blend are read, shuffled and resumed by energon; samples are encoded, packed and
collated by the code of the plain loader.  What differs: samples of several sources are drawn by
chance (weights hold on average), the order depends on the number of ranks and workers, and the
state is energon's, one per data-parallel rank.

A sample in a shard is ``KEY.json`` and its images (``data/records/webdataset.py``).
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from megatron.energon import (  # type: ignore[import-not-found]
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
from megatron.energon.epathlib import EPath  # type: ignore[import-not-found]
from megatron.energon.errors import FatalSampleError  # type: ignore[import-not-found]
from megatron.energon.flavors.webdataset.empty_dataset_error import (  # type: ignore[import-not-found]
    EmptyDatasetError,
)
from megatron.energon.flavors.webdataset.metadata import (  # type: ignore[import-not-found]
    WebdatasetMeta,
)

from moiie_megatron.data.audit.audit import Encoding
from moiie_megatron.data.encode.encoder import encode
from moiie_megatron.data.encode.images import ImageDecoder
from moiie_megatron.data.records.llava import BadRecord, parse_record
from moiie_megatron.data.stream.batch import Batch as MicroBatch
from moiie_megatron.data.stream.batch import Example
from moiie_megatron.data.stream.example import SkippedSample
from moiie_megatron.data.stream.order import Blend
from moiie_megatron.data.stream.stream_state import StreamState
from moiie_megatron.utils.errors import UserError

_SHUFFLE_BUFFER = 1000  # samples per worker, as bytes: pictures are decoded behind it
_RUN_LENGTH = 100  # samples read in a row from one place of a shard
_STATE_EVERY_S = 10.0  # a resumed worker repeats at most what it did in this time


class EnergonDataset:
    """The prepared shards of all sources.

    Args:
        sources: Folder (or ``msc://`` address) of the shards, weight and name of each.
        encoding: From records to tokens.
        images: From files to pixels.
        num_workers: Processes per rank that read ahead.

    Raises:
        UserError: A folder holds no shards that energon has indexed.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str, float, str]],
        encoding: Encoding,
        images: ImageDecoder,
        num_workers: int,
    ) -> None:
        self.sources = tuple(sources)
        self.encoding = encoding
        self.images = images
        self.num_workers = num_workers
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
        """One line: how many samples of every source an epoch has, on average."""
        names = [name or Path(path).name for path, _, name in self.sources]
        return self.blend.describe_epoch(names) + " (energon draws them by chance)"

    def describe_order(self, dp_size: int) -> str:
        """What the order depends on beside the seed."""
        return (
            f"{self.blend.describe()} by energon on {dp_size} data-parallel ranks x "
            f"{self.num_workers} workers"
        )

    def write_blend(self, path: Path) -> None:
        """Energon's description of the blend (a MetadatasetV2)."""
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
        beside = path.with_name(f"{path.name}.writing{os.getpid()}")  # every rank writes the same
        beside.write_text(yaml.safe_dump(content, sort_keys=False))
        os.replace(beside, path)


class EnergonStream:
    """The shares of one data-parallel rank, endlessly: what ``make`` does with its samples of a
    step.

    Args:
        dataset: The shards.
        make: From the samples of a share to micro-batches, in the worker.
        blend_file: Where the description of the blend is written.
        samples: Samples of a share.
        seed: Of the run.
        dp_rank: This rank, from 0.
        dp_size: Number of data-parallel ranks.
        pin_memory: Put batches into pinned memory.
        state: Where to go on; learns what to save.

    Raises:
        UserError: While iterating: too many bad samples in a row.
    """

    def __init__(
        self,
        dataset: EnergonDataset,
        make: Callable[[Sequence[Example]], list[MicroBatch]],
        *,
        blend_file: Path,
        samples: int,
        seed: int,
        dp_rank: int,
        dp_size: int,
        pin_memory: bool,
        state: StreamState,
    ) -> None:
        dataset.write_blend(blend_file)
        encoder = _Encoder(dataset.encoding, dataset.images, make)
        workers = WorkerConfig(
            rank=dp_rank,
            world_size=dp_size,
            num_workers=dataset.num_workers,
            seed_offset=seed,
            global_error_handler=encoder.note_fault,
        )
        shards = get_train_dataset(
            str(blend_file.absolute()),
            worker_config=workers,
            batch_size=samples,
            shuffle_buffer_size=_SHUFFLE_BUFFER,
            max_samples_per_sequence=_RUN_LENGTH,
            task_encoder=encoder,
        )
        self._loader = get_savable_loader(
            shards, checkpoint_every_sec=_STATE_EVERY_S, cache_pool=NoCachePool()
        )
        if state.restored is not None:
            # Energon's state is a tree of its own classes; it comes from the run's checkpoint.
            self._loader.restore_state_rank(pickle.loads(state.restored))
        state.source = lambda: pickle.dumps(self._loader.save_state_rank())
        self._pin_memory = pin_memory

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        # Closed here, because workers wait for seconds where the garbage collector ends them.
        try:
            with closing(iter(self._loader)) as shares:
                for share in shares:
                    yield [b.pin_memory() if self._pin_memory else b for b in share.batches]
        except FatalSampleError as error:
            reason = _bad_record(error)
            if reason is None:
                raise
            raise UserError(
                "Stopping: too many samples in a row could not be read, so the shards, the "
                f"template or the tokenizer must be wrong; last: {reason}."
            ) from error


@edataclass
class _Raw(Sample):  # type: ignore[misc]
    record: bytes
    images: list[tuple[str, bytes]]


@edataclass
class _Encoded(Sample):  # type: ignore[misc]
    example: Example


@edataclass
class _Share(Batch):  # type: ignore[misc]
    batches: list[MicroBatch]


@stateless
def _cook(sample: dict[str, Any]) -> _Raw:
    """The files of a sample; images in the order of their numbers."""
    files = {name: content for name, content in sample.items() if not name.startswith("__")}
    record = files.pop("json", b"")

    def number(name: str) -> int:
        return int(found[0]) if (found := re.findall(r"^\d+", name)) else 0

    images = [(name, files[name]) for name in sorted(files, key=number)]
    return _Raw(**basic_sample_keys(sample), record=record, images=images)


class _Encoder(DefaultTaskEncoder):  # type: ignore[misc]
    """Energon's hooks around the plain loader's functions."""

    decoder = None  # bytes in the shuffle buffer; the sources of errors are known
    cookers = [Cooker(_cook)]

    def __init__(
        self,
        encoding: Encoding,
        images: ImageDecoder,
        make: Callable[[Sequence[Example]], list[MicroBatch]],
    ) -> None:
        super().__init__()
        self._encoding = encoding
        self._images = images
        self._make = make
        self._faults: list[SkippedSample] = []  # since the last share of this worker

    @stateless
    def encode_sample(self, sample: _Raw) -> _Encoded:
        try:
            value = json.loads(sample.record)
        except (ValueError, RecursionError) as error:
            raise BadRecord(f"not valid JSON ({error})") from error
        record = parse_record(value, default_id=sample.__key__)
        if len(record.images) != len(sample.images):
            raise BadRecord(
                f"the record names {len(record.images)} images, the shard has {len(sample.images)}"
            )
        encoding = self._encoding
        encoded = encode(
            record,
            encoding.tokenizer,
            encoding.template,
            encoding.num_image_tokens,
            encoding.sequence_length,
        )
        pairs = zip(record.images, sample.images, strict=True)
        pixels = [self._images.decode(io.BytesIO(file), path) for path, (_, file) in pairs]
        side = self._images.image_size
        images = torch.stack(pixels) if pixels else torch.empty(0, 3, side, side, dtype=torch.uint8)
        return _Encoded.derive_from(sample, example=Example(encoded, images, record.id))

    @stateless
    def batch(self, samples: list[_Encoded]) -> _Share:
        first, *others = [sample.example for sample in samples]
        skipped_samples, self._faults = tuple(self._faults), []
        batches = self._make([replace(first, skipped_samples=skipped_samples), *others])
        return _Share(
            __key__=[sample.__key__ for sample in samples], __restore_key__=(), batches=batches
        )

    def note_fault(self, error: Exception, sample: Any, sources: Any) -> None:
        """Energon calls this, in the worker, for every sample that it would leave out.

        Raises:
            Exception: ``error`` itself if it is a bug, not a bad record.
        """
        if not isinstance(error, BadRecord):
            raise error
        found = sources[0] if sources else None
        file = f"{found.dataset_path}/{found.shard_name}" if found else "a shard"
        # The key of the sample, which our shards take from the number of the record.
        key = found.file_names[0].split(".")[0] if found and found.file_names else ""
        self._faults.append(SkippedSample(file, int(key) if key.isdecimal() else -1, str(error)))


def _bad_record(error: BaseException | None) -> str | None:
    """Why energon has given up, if it was for a bad record; else None."""
    while error is not None:
        if isinstance(error, BadRecord):
            return str(error)
        # A worker's error arrives as the text of its traceback.
        if found := re.findall(r"BadRecord: (.*)", str(error)):
            return str(found[-1])
        error = error.__cause__ or error.__context__
    return None


def _num_samples(path: str) -> int:
    """Samples in the training part of the shards at ``path``, as energon has counted them.

    Raises:
        UserError: It has not.
    """
    folder = EPath(path if "://" in path else str(Path(path).absolute()))
    try:
        meta = WebdatasetMeta.from_config(folder, split_part="train")
    except (ValueError, OSError, EmptyDatasetError) as error:
        raise UserError(
            f"{path} holds no shards with energon's index ({error}): make them with "
            "tools/prepare_data.py webdataset where megatron-energon is installed, or run energon "
            "prepare --split-ratio 1,0,0 there."
        ) from error
    return sum(shard.count for shard in meta.shards)
