"""Hundreds of damaged pictures, seeded: pixels or one sentence that names the file."""

from __future__ import annotations

import io
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from moiie_megatron.data.encode.images import ImageDecoder
from moiie_megatron.data.records.record import BadRecord
from tests.helpers.fuzz import damaged, time_limit

SIDE = 24
ROUNDS = 500  # for every kind
# Smooth, so that lossy formats keep the pixels apart from their rotations.
PIXELS = np.add.outer(np.arange(SIDE) * 9, np.arange(SIDE))[..., None] % 256 + np.zeros(3)
XMP = b'<x:xmpmeta tiff:Orientation="6"></x:xmpmeta>'
PROFILE = bytes(128) + b"profile" * 20


def exif() -> bytes:
    found = Image.Exif()
    found[0x0112], found[0x010F], found[0x011A], found[0x9C9B] = 6, "maker" * 9, 72.5, b"x\0y\0"
    found.get_ifd(0x8769).update(
        {0x829A: 0.01, 0x9286: b"ASCII\0\0\0hello", 0x927C: b"Nikon\0" * 9}
    )
    found.get_ifd(0x8825).update({1: "N", 2: (1.0, 2.0, 3.0)})
    return found.tobytes()


def saved(kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS.astype(np.uint8)).save(file, kind, **options)
    return file.getvalue()


def png() -> bytes:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("a", "b" * 50, zip=True)
    texts.add_itxt("XML:com.adobe.xmp", XMP.decode())
    return saved("PNG", exif=exif(), icc_profile=PROFILE, pnginfo=texts)


KINDS: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: saved("JPEG", exif=exif(), icc_profile=PROFILE, comment=b"c", xmp=XMP),
    "progressive": lambda: saved("JPEG", progressive=True, quality=50),
    "png": png,
    "webp": lambda: saved("WEBP", exif=exif(), icc_profile=PROFILE, xmp=XMP, lossless=True),
    "gif": lambda: saved(
        "GIF", comment=b"c", save_all=True, append_images=[Image.new("L", (9, 9))]
    ),
    "bmp": lambda: saved("BMP"),
    "tiff": lambda: saved("TIFF", exif=exif(), icc_profile=PROFILE),
    "deflated_tiff": lambda: saved("TIFF", compression="tiff_deflate"),
    "ppm": lambda: saved("PPM"),
}


def decode(content: bytes, mode: Any = "square") -> Tensor:
    return ImageDecoder(SIDE, mode, (0.5, 0.5, 0.5)).decode(io.BytesIO(content), "a.img")


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_containers(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw = random.Random(kind)
    whole = KINDS[kind]()
    for number in range(ROUNDS):
        content = damaged(whole, draw)
        with time_limit(5):
            try:
                pixels = decode(content, draw.choice(("square", "pad")))
            except BadRecord as error:
                assert str(error).startswith("image a.img "), number
                assert "\n" not in str(error) and len(str(error)) < 300, number
            else:
                assert pixels.shape == (3, SIDE, SIDE) and pixels.dtype == torch.uint8, number
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_damaged_exif_never_costs_a_picture(kind: str) -> None:
    draw = random.Random(kind)
    whole = KINDS[kind]()
    tags = exif().removeprefix(b"Exif\0\0")
    first = whole.index(tags)
    last = first + len(tags)
    upright = decode(whole)
    turned = [upright.rot90(turns, (1, 2)) for turns in range(4)]
    possible = turned + [image.flip(2) for image in turned]
    for number in range(ROUNDS):
        content = damaged(whole, draw, first, last)
        if kind == "png" and number % 2:  # else the checksum is wrong as well
            crc = zlib.crc32(content[first - 4 : last]).to_bytes(4, "big")
            content = content[:last] + crc + content[last + 4 :]
        pixels = decode(content)
        assert any(torch.equal(pixels, image) for image in possible), number
