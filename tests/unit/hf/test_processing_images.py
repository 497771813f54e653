"""Pictures and arrays of every kind: the processor's pixels are those of training."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.image_transforms import convert_to_rgb

from moiie_megatron.data.encode import pixels
from moiie_megatron.data.encode.images import ImageLoader, normalize
from moiie_megatron.families.registry import vision_family
from moiie_megatron.hf import pixels_moiie
from moiie_megatron.hf.processing_moiie import MoiieProcessor
from tests.unit.hf import tiny


@pytest.fixture(scope="module", params=["square", "pad"])
def processor(request: Any, directory: Path) -> MoiieProcessor:
    return tiny.processor(directory / f"images_{request.param}", "siglip", request.param)


def pixel_values(processor: MoiieProcessor, image: Any, **options: Any) -> Tensor:
    inputs = processor(text="<image>", images=[image], return_tensors="pt", **options)
    values: Tensor = inputs["pixel_values"]
    return values


def trained_on(processor: MoiieProcessor, file: Path) -> Tensor:
    statistics = vision_family("siglip").statistics
    mode: Any = processor.image_mode
    loaded = ImageLoader(file.parent, 28, mode, statistics.mean).load(file.name)
    return normalize(loaded[None], statistics.mean, statistics.std)


def save_palette(file: Path) -> None:
    image = tiny.picture(0, 40, 30).quantize(7)
    image.save(file, transparency=bytes([0, 255, 128, 7]))


def save_palette_colour(file: Path) -> None:
    tiny.picture(0, 40, 30).quantize(7).save(file, transparency=2)


def save_colour_key(file: Path) -> None:
    image = tiny.picture(0, 40, 30)
    image.paste((1, 2, 3), (5, 5, 20, 20))
    image.save(file, transparency=(1, 2, 3))


def save_grey_key(file: Path) -> None:
    image = tiny.picture(0, 40, 30).convert("L")
    image.paste(9, (5, 5, 20, 20))
    image.save(file, transparency=9)


def save_alpha(file: Path) -> None:
    image = tiny.picture(0, 40, 30)
    image.putalpha(tiny.picture(1, 40, 30).convert("L"))
    image.save(file)


def save_grey_alpha(file: Path) -> None:
    image = tiny.picture(0, 40, 30)
    image.putalpha(77)
    image.convert("LA").save(file)


def save_deep(file: Path) -> None:
    values = np.random.default_rng(5).integers(0, 65536, (25, 35)).astype(np.uint16)
    Image.fromarray(values).save(file)


def save_bits(file: Path) -> None:
    tiny.picture(0, 40, 30).convert("1").save(file)


def save_damaged_exif(file: Path) -> None:
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + b"\x01\x12\0\x03\0\0\0\x01\0\x08\0\0"
    exif += b"\x87\x69\0\x02\0\0\0\x04abc\0" + b"\0\0\0\0"
    tiny.picture(0, 40, 30).save(file, exif=exif)


def save_long(file: Path) -> None:
    tiny.picture(0, 12, 300).resize((4, 8300)).save(file)


KINDS = [
    (save_palette, "png"),
    (save_palette_colour, "png"),
    (save_palette_colour, "gif"),
    (save_colour_key, "png"),
    (save_grey_key, "png"),
    (save_alpha, "png"),
    (save_alpha, "webp"),
    (save_grey_alpha, "png"),
    (save_deep, "png"),
    (save_bits, "png"),
    (save_damaged_exif, "jpg"),
    (save_long, "png"),
]


@pytest.mark.parametrize(("save", "suffix"), KINDS, ids=lambda x: getattr(x, "__name__", x))
def test_pictures_equal_training(
    save: Any, suffix: str, processor: MoiieProcessor, tmp_path: Path
) -> None:
    file = tmp_path / f"a.{suffix}"
    save(file)
    want = trained_on(processor, file)
    with Image.open(file) as image:
        before = dict(image.info)
        assert torch.equal(pixel_values(processor, image), want)
        assert image.info.keys() >= before.keys()  # the caller's picture is left as it was
    with Image.open(file) as image:
        image.load()
        assert torch.equal(pixel_values(processor, image, do_convert_rgb=True), want)
    assert torch.equal(pixel_values(processor, str(file)), want)


def test_composited_by_the_caller(processor: MoiieProcessor, tmp_path: Path) -> None:
    """A picture without transparency is taken as it is, whoever removed it."""
    save_palette(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        composited = Image.fromarray(convert_to_rgb(image, return_numpy=True))
    composited.save(tmp_path / "b.png")
    want = trained_on(processor, tmp_path / "b.png")
    assert torch.equal(pixel_values(processor, composited), want)
    assert not torch.equal(trained_on(processor, tmp_path / "a.png"), want)


@pytest.mark.parametrize(("height", "width"), [(1, 9), (3, 9), (9, 1), (9, 3), (1, 1), (3, 3)])
@pytest.mark.parametrize("grey", [False, True])
def test_narrow_arrays(
    height: int, width: int, grey: bool, processor: MoiieProcessor, tmp_path: Path
) -> None:
    image = tiny.picture(2, width, height)
    image = image.convert("L") if grey else image
    image.save(tmp_path / "a.png")
    want = trained_on(processor, tmp_path / "a.png")
    last = np.asarray(image).reshape(height, width, -1)
    first = last.transpose(2, 0, 1).copy()
    assert torch.equal(pixel_values(processor, last), want)
    assert torch.equal(pixel_values(processor, torch.from_numpy(first)), want)
    for array in (last, torch.from_numpy(last.copy())):
        got = pixel_values(processor, array, input_data_format="channels_last")
        assert torch.equal(got, want)
    for array in (first, torch.from_numpy(first)):
        got = pixel_values(processor, array, input_data_format="channels_first")
        assert torch.equal(got, want)


def test_the_exported_code_is_that_of_training() -> None:
    def functions(module: ModuleType) -> dict[str, str]:
        found = inspect.getmembers(module, inspect.isfunction)
        return {name: inspect.getsource(value) for name, value in found}

    assert set(functions(pixels)) == {"upright", "as_rgb", "as_square"}
    assert functions(pixels_moiie) == functions(pixels)
    assert pixels_moiie._TURNS == pixels._TURNS
    assert pixels_moiie.LARGEST_SQUARE == pixels.LARGEST_SQUARE
