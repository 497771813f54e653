"""Lengths of the samples of a record file, kept beside it with all that they depend on.

``NAME.lengths.npy`` is int32 [n] (tokens before anything is cut off, 0 for a record that cannot be
used), ``NAME.lengths.json`` says for which content of the file, tokenizer and template.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from moiie_megatron.utils.errors import UserError


@dataclass(frozen=True)
class LengthKey:
    """What the lengths depend on."""

    records_bytes: int
    records_mtime_ns: int
    tokenizer: str
    image_token: str
    template: str
    num_image_tokens: int

    @classmethod
    def of(
        cls,
        records: Path,
        *,
        tokenizer: Path,
        image_token: str,
        template: str,
        num_image_tokens: int,
    ) -> LengthKey:
        """The key of a record file as it is now; the tokenizer by a digest of its files."""
        status = records.stat()
        return cls(
            status.st_size,
            status.st_mtime_ns,
            _digest(tokenizer),
            image_token,
            template,
            num_image_tokens,
        )


def length_files(records: Path, folder: Path | None = None) -> tuple[Path, Path]:
    """The .npy and the .json of a record file, beside it or in another folder."""
    stem = (folder or records.parent) / (records.name + ".lengths")
    return stem.with_name(stem.name + ".npy"), stem.with_name(stem.name + ".json")


def write_lengths(
    records: Path, key: LengthKey, lengths: np.ndarray, folder: Path | None = None
) -> Path:
    """Keep the lengths of a record file.

    Returns:
        The .npy.

    Raises:
        UserError: The folder cannot be written to.
    """
    table, description = length_files(records, folder)
    values = {**asdict(key), "samples": len(lengths), "tokens": int(lengths.sum())}
    try:
        table.parent.mkdir(parents=True, exist_ok=True)
        description.unlink(missing_ok=True)  # between the two renames nothing old is believed
        for final, content in ((table, None), (description, json.dumps(values, indent=1))):
            beside = final.with_name(final.name + ".writing")
            with beside.open("wb") as file:
                if content is None:
                    np.save(file, lengths.astype(np.int32))
                else:
                    file.write(content.encode() + b"\n")
            os.replace(beside, final)
    except OSError as error:
        raise UserError(
            f"Cannot write {table} ({error.strerror or error}): choose a folder with --out."
        ) from error
    return table


def read_lengths(records: Path, key: LengthKey, folder: Path | None = None) -> np.ndarray:
    """The lengths that ``write_lengths`` has kept, mapped into memory.

    Raises:
        UserError: There are none, or they are those of other records or another encoding.
    """
    table, description = length_files(records, folder)
    again = f"make it with tools/prepare_data.py lengths, records {records}."
    try:
        found = json.loads(description.read_text())
        lengths: np.ndarray = np.load(table, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"There is no length index {table} ({error}): {again}") from error
    for name, wanted in asdict(key).items():
        if found.get(name) != wanted:
            raise UserError(
                f"The length index {table} is stale ({name} was {found.get(name)}, now it is "
                f"{wanted}): {again}"
            )
    if found.get("samples") != len(lengths):
        raise UserError(f"The length index {table} does not belong to {description}: {again}")
    return lengths


def rows_needed(lengths: np.ndarray, capacity: int) -> int:
    """Rows of ``capacity`` tokens that all samples fit into, samples cut at the capacity.

    Longest first, each length into the fullest rows that still take it: close to the fewest
    possible, and about what packing within large portions reaches.
    """
    free: Counter[int] = Counter()  # rows by the room that they still have
    rows = 0
    counts = Counter(np.minimum(lengths[lengths > 0], capacity).tolist())
    for length in sorted(counts, reverse=True):
        left = counts[length]
        for room in sorted(room for room in free if room >= length):
            left = _fill(free, room, length, left)
        new = -(-left // (capacity // length))
        rows += new
        free[capacity] += new
        _fill(free, capacity, length, left)
        free = +free  # rooms that no row has any more
    return rows


def _fill(free: Counter[int], room: int, length: int, count: int) -> int:
    """Put samples of one length into the rows with that room; returns how many are left."""
    each = room // length
    full = min(free[room], count // each)
    free[room] -= full
    free[room - each * length] += full
    count -= full * each
    if count and free[room]:  # fewer than a row takes
        free[room] -= 1
        free[room - count * length] += 1
        count = 0
    return count


def _digest(tokenizer: Path) -> str:
    """sha256 over what ``load_tokenizer`` may read at this path."""
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    files = [folder / name for name in (*names, "chat_template.jinja")]
    if tokenizer.suffix == ".model":
        files = [tokenizer]
    elif tokenizer.is_dir():
        files += sorted(tokenizer.glob("*.model"))
    elif tokenizer not in files:
        files = [tokenizer]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()
