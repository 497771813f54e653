"""Damaged or large metadata beside good pixels, and what else a picture may raise."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, PngImagePlugin
from torch import Tensor

from moiie_megatron.data.encode.images import ImageDecoder
from moiie_megatron.data.records.record import BadRecord

SIDE = 16
PIXELS = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
SIGNATURE, HEADER = 8, 8 + 25  # where the first and the second chunk of a PNG file begin


def decode(content: bytes) -> Tensor:
    return ImageDecoder(SIDE, "square", (0.5, 0.5, 0.5)).decode(io.BytesIO(content), "a.img")


def saved(kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes, crc_error: int = 0) -> bytes:
    crc = zlib.crc32(kind + data) ^ crc_error
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def exif(*entries: tuple[int, int, int, bytes], rest: bytes = b"") -> bytes:
    """Big-endian EXIF with the entries (tag, type, count, four bytes); ``rest`` is at byte 100."""
    table = struct.pack(">H", len(entries))
    for tag, kind, count, value in entries:
        table += struct.pack(">HHI", tag, kind, count) + value
    return (b"MM\0*\0\0\0\x08" + table + b"\0\0\0\0").ljust(100, b"\0") + rest


TURNED = (0x0112, 3, 1, b"\0\x06\0\0")  # clockwise by 90 degrees
AT_100 = b"\0\0\0\x64"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    "entry",
    [
        (0x011A, 5, 1, AT_100),  # a fraction with denominator 0
        (0x010F, 2, 2**31, AT_100),  # text that ends behind the file
        (0x010F, 200, 3, AT_100),  # a type that does not exist
        (0x0131, 3, 9, b"\xff\xff\xff\xff"),
        (0x8769, 4, 1, b"\xff\xff\xff\xf0"),  # a directory behind the file
        (0x8769, 2, 4, b"abc\0"),  # a directory at a text
        (0x8825, 4, 1, b"\0\0\0\x08"),  # a directory that is its own parent
        # For each of these, PIL cannot write the EXIF that it has read.
        (0x0100, 1, 1, b"\0\0\0\x64"),
        (0x0100, 6, 1, b"\xff\xff\xff\xff"),
        (0x010F, 5, 1, AT_100),
        (0x010F, 11, 1, b"\0\0\0\0"),
        (0x011A, 2, 4, b"abc\0"),
        (0x011A, 11, 1, b"\xff\xff\xff\xff"),
        (0x0128, 4, 1, b"\xff\xff\xff\xff"),
        (0x8769, 6, 1, b"\xff\xff\xff\xff"),
    ],
)
def test_damaged_exif_leaves_the_orientation(kind: str, entry: Any) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    content = exif(TURNED, entry, rest=b"\0\0\0\x07\0\0\0\0")
    file = saved(kind, exif=b"Exif\0\0" + content, **options)
    assert torch.equal(decode(file), decode(saved(kind, **options)).rot90(-1, (1, 2)))


def test_damaged_entries_of_a_tiff() -> None:
    """Orientation and pixels are in the same directory as the damaged entry."""
    file = saved("TIFF", tiffinfo={0x0112: 6, 0x010F: "maker"})
    assert b"maker" in file
    damaged = decode(file.replace(b"maker", b"\xff\xff\0\xff\xff"))
    assert torch.equal(damaged, decode(saved("TIFF")).rot90(-1, (1, 2)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0",
        b"no tiff at all",
        b"MM\0*\xff\xff\xff\xff",
        b"II*\0\x08\0\0\0\xff\xff",
        exif((0x0112, 3, 1, b"\0\x63\0\0")),  # no such orientation
        exif((0x0112, 2, 4, b"six\0")),
        exif((0x0112, 5, 1, AT_100), rest=b"\0" * 8),  # 0 / 0
    ],
)
def test_unreadable_orientation_is_none(kind: str, content: bytes) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    file = saved(kind, exif=b"Exif\0\0" + content, **options)
    assert torch.equal(decode(file), decode(saved(kind, **options)))


@pytest.mark.parametrize(
    "metadata",
    [
        chunk(b"iCCP", b"large\0\0" + zlib.compress(bytes(2**21))),
        chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(2**21))),
        chunk(b"iTXt", b"key\0\1\0\0\0" + zlib.compress(bytes(2**21))),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(2**21))),
        chunk(b"tEXt", b"key\0" + bytes(2**20)) * 70,  # more than 64 MiB together
        chunk(b"tEXt", b"key\0value") * 20_000,
        chunk(b"tEXt", b"key\0value", crc_error=1),
        chunk(b"eXIf", exif(), crc_error=1),
        chunk(b"gAMA", b"\0", crc_error=1) + chunk(b"pHYs", b"") + chunk(b"tRNS", b"\0"),
        chunk(b"iCCP", b"cut\0\0" + zlib.compress(bytes(99))[:-9]),
    ],
    ids=lambda data: f"{data[4:8].decode()}-{len(data)}-{data[-1]}",
)
@pytest.mark.parametrize("behind_pixels", [False, True])
def test_metadata_of_a_png_does_not_matter(metadata: bytes, behind_pixels: bool) -> None:
    limits = (PngImagePlugin.MAX_TEXT_CHUNK, ImageFile.LOAD_TRUNCATED_IMAGES)
    good = saved("PNG")
    at = len(good) - 12 if behind_pixels else HEADER
    assert torch.equal(decode(good[:at] + metadata + good[at:]), decode(good))
    assert limits == (PngImagePlugin.MAX_TEXT_CHUNK, ImageFile.LOAD_TRUNCATED_IMAGES)


@pytest.mark.parametrize(
    "orientation",
    [
        chunk(b"eXIf", exif(TURNED)),
        chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'),
    ],
    ids=["eXIf", "XMP"],
)
def test_the_orientation_beside_damaged_chunks(orientation: bytes) -> None:
    good = saved("PNG")
    damaged = chunk(b"tEXt", b"key\0value", crc_error=1)
    file = good[:HEADER] + damaged + orientation + good[HEADER:]
    assert torch.equal(decode(file), decode(good).rot90(-1, (1, 2)))


def test_damaged_pixels_of_a_png_are_still_refused() -> None:
    good = saved("PNG")
    text = chunk(b"tEXt", b"key\0value", crc_error=1)
    broken = good[:HEADER] + text + good[HEADER:-40] + b"\0" * 9 + good[-31:]
    for content in (broken, good[: HEADER + 40], b"\x89PNG\r\n\x1a\n", text * 3):
        with pytest.raises(BadRecord, match=r"image a\.img cannot be read"):
            decode(content)


@pytest.mark.parametrize(
    "error",
    [struct.error("x"), OverflowError(), RecursionError("deep"), MemoryError(), KeyError(3)],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("name", ["load", "convert"])
def test_whatever_pil_raises_names_the_file(
    error: Exception, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Callable[..., Any]:
        raise error

    content = saved("BMP")
    monkeypatch.setattr(Image.Image, name, fail)
    reason = str(error) or type(error).__name__
    with pytest.raises(BadRecord) as caught:
        decode(content)
    assert str(caught.value) == f"image a.img cannot be read ({reason})"
