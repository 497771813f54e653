"""Image files to uint8 tensors (shapes: ``moiie_megatron/data/__init__.py``).

Decoded by PIL alone, so torchvision is no dependency.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from moiie_megatron.data.encode import png
from moiie_megatron.data.encode.pixels import as_rgb, as_square, upright
from moiie_megatron.data.records.record import BadRecord
from moiie_megatron.utils.errors import UserError

MAX_PIXELS: Final = 2**26
# Formats that hold pixels and nothing else: for EPS, PIL would start Ghostscript.
_FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (i, 3, S, S) to normalised float32 (i, 3, S, S), on the device of ``images``."""
    pixels = images.float().div_(255.0)
    # Plain numbers, channel by channel: a tensor of them would be a copy that the host waits for.
    for channel, numbers in enumerate(zip(mean, std, strict=True)):
        pixels[:, channel].sub_(numbers[0]).div_(numbers[1])
    return pixels


class ImageDecoder:
    """Decodes image files and resizes them to S x S pixels.

    Args:
        image_size: Side S of the result in pixels.
        mode: ``square`` stretches to S x S; ``pad`` first pastes the image into the centre of a
            square of the mean colour (LLaVA's ``image_aspect_ratio: pad``).
        mean: Mean per channel, 0..1: the colour of the padding.
        max_pixels: Larger images are refused before they are decoded.
    """

    def __init__(
        self,
        image_size: int,
        mode: Literal["square", "pad"],
        mean: tuple[float, float, float],
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.image_size = image_size
        self.mode = mode
        self.mean = mean
        self.max_pixels = max_pixels

    def decode(self, file: Path | BinaryIO, name: str) -> Tensor:
        """Decode one image.

        Args:
            file: The encoded image.
            name: Names the image in messages.

        Returns:
            uint8 (3, S, S), RGB, upright.

        Raises:
            BadRecord: Not an image, damaged or too large.
        """
        with _pil(name):
            image = _read(file, name, self.max_pixels)
            if self.mode == "pad":
                image = as_square(image, self.image_size, self.mean)
            image = image.resize((self.image_size,) * 2, Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())

    def decode_all(self, files: Iterable[tuple[Path | BinaryIO, str]]) -> Tensor:
        """Decode all images of a sample.

        Args:
            files: Arguments of ``decode``; read one after the other.

        Returns:
            uint8 (i, 3, S, S); i is 0 for a sample without images.

        Raises:
            BadRecord: See ``decode``.
        """
        pixels = [self.decode(file, name) for file, name in files]
        side = self.image_size
        return torch.stack(pixels) if pixels else torch.empty(0, 3, side, side, dtype=torch.uint8)


class ImageLoader(ImageDecoder):
    """Reads images below one directory.

    Args:
        root: The directory; a path that leaves it, by ``..`` or a symbolic link, is refused.
        allow_outside: Read what lies outside too: behind symbolic links and under absolute paths.

    The other arguments are those of ``ImageDecoder``.

    Raises:
        UserError: ``root`` is not a directory.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int,
        mode: Literal["square", "pad"],
        mean: tuple[float, float, float],
        max_pixels: int = MAX_PIXELS,
        *,
        allow_outside: bool = False,
    ) -> None:
        self.allow_outside = allow_outside
        self.root = Path(root).resolve()
        if not self.root.is_dir():
            raise UserError(
                f"The image directory {root} does not exist or is no directory: correct the path."
            )
        super().__init__(image_size, mode, mean, max_pixels)

    def load(self, path: str) -> Tensor:
        """The image at ``path`` (relative to the root): uint8 (3, S, S), RGB, upright.

        Raises:
            BadRecord: Outside the root, missing, not an image, damaged or too large.
        """
        return self.decode(self.locate(path), path)

    def load_all(self, paths: Sequence[str]) -> Tensor:
        """The images at ``paths`` (relative to the root): uint8 (i, 3, S, S).

        Raises:
            BadRecord: See ``load``.
        """
        return self.decode_all((self.locate(path), path) for path in paths)

    def locate(self, path: str) -> Path:
        """The file of the image at ``path`` (relative to the root).

        Raises:
            BadRecord: Outside the root and not allowed to be, or missing.
        """
        relative = Path(path)
        leaves = relative.is_absolute() or ".." in relative.parts
        if "\0" in path or (leaves and not self.allow_outside):
            raise BadRecord(
                f"image {path!r} is not a relative path below {self.root}; "
                "data.allow_outside_images=true reads others"
            )
        try:
            file = (self.root / relative).resolve()
            if not self.allow_outside and not file.is_relative_to(self.root):
                raise BadRecord(
                    f"image {path} is a link out of {self.root}, to {file}; "
                    "data.allow_outside_images=true follows it"
                )
            if not file.is_file():
                raise BadRecord(f"image {path} does not exist below {self.root}")
        except (OSError, RuntimeError) as error:  # name too long, circular links
            raise BadRecord(f"image {path[:200]} cannot be read ({error})") from error
        return file


def read_image(file: Path | BinaryIO, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """One picture, upright and in mode RGB, of the size that it has (arguments: ``decode``).

    Raises:
        BadRecord: Not an image, damaged or too large.
    """
    with _pil(name):
        return _read(file, name, max_pixels)


@contextmanager
def _pil(name: str) -> Iterator[None]:
    """Whatever PIL raises for a damaged file in the block becomes a ``BadRecord``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata does not spoil the pixels
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except BadRecord:
        raise
    except UnidentifiedImageError as error:  # its own text prints the file object
        raise BadRecord(f"image {name} cannot be read (unknown image format)") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadRecord(f"image {name} cannot be read ({reason})") from error


def _read(file: Path | BinaryIO, name: str, max_pixels: int) -> Image.Image:
    try:
        return _open(file, name, max_pixels)
    except BadRecord:
        raise
    except Exception:
        content = _content(file)
        if not content.startswith(png.SIGNATURE):
            raise
        return _open(io.BytesIO(png.without_metadata(content)), name, max_pixels)


def _open(file: Path | BinaryIO, name: str, max_pixels: int) -> Image.Image:
    with Image.open(file, formats=_FORMATS) as opened:
        width, height = opened.size
        if width * height > max_pixels:
            raise BadRecord(
                f"image {name} of {width} x {height} needs {width * height} pixels, more than "
                f"{max_pixels}"
            )
        return as_rgb(upright(opened))


def _content(file: Path | BinaryIO) -> bytes:
    if isinstance(file, Path):
        return file.read_bytes()
    file.seek(0)
    return file.read()
