"""Records and images into tar shards (webdataset), for megatron-energon and object storage.

A sample is ``KEY.json`` (the LLaVA record as it stands in the file) and its images as they are,
``KEY.jpg``, or ``KEY.0.jpg``, ``KEY.1.png``... where it has several.  KEY is the record number.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from moiie_megatron.data.records.llava import BadRecord
from moiie_megatron.data.stream.dataset import Source
from moiie_megatron.data.stream.example import SkippedSample
from moiie_megatron.utils.errors import UserError


def write_shards(
    source: Source,
    folder: Path,
    *,
    samples_per_shard: int = 10_000,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[str], tuple[SkippedSample, ...]]:
    """Write the samples of a source, in order, as ``shard_00000.tar``...

    Images are copied, not decoded.  The shards depend on nothing but the data: times and owners
    are zero.

    Args:
        folder: Exists; should be empty.

    Returns:
        Names of the shards, and the records left out: malformed, or with a missing image.

    Raises:
        UserError: Not one record can be used.
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
                    shard.close()  # the one before
                    names.append(f"shard_{len(names):05d}.tar")
                    path = folder / names[-1]
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
            f"None of the {total} records of {source.records.path} can be used; the first: "
            f"{skipped_samples[0].reason}."
        )
    return names, tuple(skipped_samples)


def _members(source: Source, i: int) -> list[tuple[str, bytes]]:
    """Names and contents of the files of a sample.

    Raises:
        BadRecord: It is malformed, or an image cannot be read.
    """
    images = source.records[i].images
    key = f"{i:09d}"
    record = json.dumps(source.records.value(i), separators=(",", ":")).encode()
    members = [(f"{key}.json", record)]
    for number, path in enumerate(images):
        middle = f".{number}" if len(images) > 1 else ""
        # Decoders look into the file.  A name that a tar header cannot hold needs no other.
        suffix = Path(path).suffix.lower()
        suffix = suffix if suffix.isascii() and 1 < len(suffix) <= 10 else ".img"
        try:
            content = source.images.locate(path).read_bytes()
        except OSError as error:
            raise BadRecord(f"image {path} cannot be read ({error})") from error
        members.append((f"{key}{middle}{suffix}", content))
    return members
