"""Records and images of which a known part is broken, each kind of damage several times."""

from __future__ import annotations

import io
import json
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# What is done to a record, and words of the reason that must be given for it.
DAMAGES = {
    "truncated": "truncated.jpg cannot be read",
    "missing": "does not exist below",
    "malformed": "not valid JSON",
    "placeholders": "2 <image> placeholders but 1 images",
    "empty": "empty.jpg cannot be read",
    "text": "a red cat on a mat does not exist",
    "outside": "'../secret.png' is not a relative path below",
    "bomb": "bomb.png cannot be read",
}


@dataclass(frozen=True)
class DamagedData:
    """Attributes:
    damage: Kind of damage by record number.
    """

    records: Path
    images: Path
    samples: int
    damage: dict[int, str]

    @property
    def good_ids(self) -> set[str]:
        return {f"r{i}" for i in range(self.samples) if i not in self.damage}


def write_damaged(folder: Path, samples: int, bad: int) -> DamagedData:
    """Write ``records.jsonl`` and ``images/``; the broken records are spread evenly."""
    images = folder / "images"
    images.mkdir(parents=True)
    pixels = np.random.default_rng(5).integers(0, 255, (10, 16, 16, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(images / f"{i}.jpg")
    whole = (images / "0.jpg").read_bytes()
    (images / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "empty.jpg").write_bytes(b"")
    (images / "bomb.png").write_bytes(_bomb())
    Image.fromarray(pixels[0]).save(folder / "secret.png")

    every = samples // bad
    kinds = list(DAMAGES)
    damage = {n * every + n % every: kinds[n % len(kinds)] for n in range(bad)}
    lines = [_line(i, damage.get(i)) for i in range(samples)]
    (folder / "records.jsonl").write_text("".join(line + "\n" for line in lines))
    return DamagedData(folder / "records.jsonl", images, samples, damage)


def _line(i: int, damage: str | None) -> str:
    record: dict[str, Any] = {
        "id": f"r{i}",
        "image": f"{i % 10}.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": f"It is {i}."},
        ],
    }
    named = {
        "truncated": "truncated.jpg",
        "missing": f"no/{i}.jpg",
        "empty": "empty.jpg",
        "text": "a red cat on a mat",
        "outside": "../secret.png",
        "bomb": "bomb.png",
    }
    if damage in named:
        record["image"] = named[damage]
    if damage == "placeholders":
        record["conversations"][0]["value"] = "<image>\n<image>\nWhat is it?"
    line = json.dumps(record)
    return line[:-9] if damage == "malformed" else line


def _bomb() -> bytes:
    """A PNG of a few hundred bytes that says it has 50000 x 50000 pixels."""
    png = io.BytesIO()
    png.write(b"\x89PNG\r\n\x1a\n")
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")):
        check = zlib.crc32(kind + content)
        png.write(struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check))
    return png.getvalue()
