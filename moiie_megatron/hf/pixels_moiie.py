"""Pictures as the model takes them: upright, RGB and, in ``pad`` mode, square.

The same code prepares the pictures in training.
"""

from __future__ import annotations

from typing import Final

from .version_moiie import TESTED_VERSIONS  # noqa: F401  # first: older versions lack names

# isort: split

import numpy as np
from PIL import Image
from PIL.ExifTags import Base

LARGEST_SQUARE: Final = 2**26  # pixels of a square that a picture is pasted into as it is
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says; an unreadable one counts as none.

    Not ``ImageOps.exif_transpose``: it also writes the other EXIF fields anew, and raises where
    one of them is damaged.
    """
    image.load()  # PIL turns a TIFF picture itself here, and takes its orientation away
    try:
        turn = _TURNS.get(image.getexif().get(Base.Orientation, 1))
    except Exception:  # PIL raises nearly anything for damaged EXIF, which says nothing of pixels
        turn = None
    return image if turn is None else image.transpose(turn)


def as_rgb(image: Image.Image) -> Image.Image:
    """The picture in mode RGB, without the alpha channel and without ``info``.

    Raises:
        ValueError: Its pixels are floating-point numbers.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range: save the image as RGB")
    if image.mode.startswith("I"):  # 16 bits per pixel: PIL's own conversion clips at 255
        pixels = (np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(pixels).convert("RGB")
    rgb = image.convert("RGB")
    rgb.info = {}  # libraries would composite an RGB picture that has a transparent colour there
    return rgb


def as_square(image: Image.Image, side: int, mean: tuple[float, ...]) -> Image.Image:
    """The picture in the middle of a square of the mean colour (LLaVA's ``expand2square``).

    The square has the picture's longer side.  Where it would have more than ``LARGEST_SQUARE``
    pixels, the picture is first resized, and the square has ``side``.

    Args:
        image: In mode RGB.
        side: What the square will be resized to, in pixels.
        mean: Mean per channel, 0..1.
    """
    longer = max(image.size)
    if longer**2 > LARGEST_SQUARE:
        width, height = (max(1, round(pixels * side / longer)) for pixels in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        longer = side
    colour = tuple(int(channel * 255) for channel in mean)
    square = Image.new("RGB", (longer, longer), colour)
    square.paste(image, ((longer - image.width) // 2, (longer - image.height) // 2))
    return square
