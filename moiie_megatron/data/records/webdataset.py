"""Writes records and images as tar shards (webdataset), for megatron-energon and object storage.

A sample is ``KEY.json`` (the LLaVA record as it stands in its file) and its image files, copied:
``KEY.jpg``, or ``KEY.0.jpg``, ``KEY.1.png``, ... if there are several.  KEY is the record number.

Written with ``tarfile``: ``webdataset.ShardWriter`` comes with energon only, which is optional, and
sorts the images of a sample by name (10 before 2).
"""

from __future__ import annotations

import io
import json
import tarfile
from contextlib import ExitStack
from pathlib import Path

from moiie_megatron.data.records.record import BadRecord
from moiie_megatron.data.stream.dataset import Source
from moiie_megatron.data.stream.example import SkippedSample
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.progress import ProgressFn


def write_shards(
    source: Source,
    directory: Path,
    *,
    samples_per_shard: int = 10_000,
    progress: ProgressFn | None = None,
) -> tuple[list[str], tuple[SkippedSample, ...]]:
    """Write the samples of a source, in order, as ``shard_00000.tar``, ``shard_00001.tar``, ...

    The shards depend on the data alone: times and owners are zero.

    Args:
        source: Records and images; images are copied, not decoded.
        directory: An existing directory, should be empty.
        samples_per_shard: The last shard has fewer.
        progress: Called with the records done and their total.

    Returns:
        The names of the shards, and the skipped records: malformed, or with a missing image.

    Raises:
        UserError: No record can be used.
    """
    total = len(source.records)
    skipped_samples: list[SkippedSample] = []
    names: list[str] = []
    written = 0
    with ExitStack() as shard:
        for i in range(total):
            try:
                members = _members(source, i)
            except BadRecord as error:
                skipped_samples.append(SkippedSample(str(source.records.path), i, error.reason))
            else:
                if written % samples_per_shard == 0:
                    shard.close()  # the previous one
                    names.append(f"shard_{len(names):05d}.tar")
                    path = directory / names[-1]
                    tar = shard.enter_context(tarfile.open(path, "w", format=tarfile.USTAR_FORMAT))
                for name, content in members:
                    header = tarfile.TarInfo(name)
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
                written += 1
            if progress is not None and (i % 100 == 99 or i + 1 == total):
                progress(i + 1, total)
    if not written:
        raise UserError(
            f"None of the {total} records of {source.records.path} can be used: repair them; the "
            f"first: {skipped_samples[0].reason}."
        )
    return names, tuple(skipped_samples)


def _members(source: Source, i: int) -> list[tuple[str, bytes]]:
    """Names and contents of the files of sample ``i``.

    Raises:
        BadRecord: The record is malformed, or an image cannot be read.
    """
    images = source.records[i].images
    key = f"{i:09d}"
    record = json.dumps(source.records.value(i), separators=(",", ":")).encode()
    members = [(f"{key}.json", record)]
    for number, path in enumerate(images):
        middle = f".{number}" if len(images) > 1 else ""
        # Image decoders ignore the suffix, so one that is too long for a tar header is replaced.
        suffix = Path(path).suffix.lower()
        suffix = suffix if suffix.isascii() and 1 < len(suffix) <= 10 else ".img"
        try:
            content = source.images.locate(path).read_bytes()
        except OSError as error:
            raise BadRecord(f"image {path} cannot be read ({error})") from error
        members.append((f"{key}{middle}{suffix}", content))
    return members
