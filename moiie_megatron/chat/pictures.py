"""Pictures of a conversation: checked, and small copies from which come the same pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from PIL import Image

from moiie_megatron.chat.limits import Limits
from moiie_megatron.data.encode.images import read_image
from moiie_megatron.data.encode.pixels import as_square
from moiie_megatron.utils.errors import UserError

# Endings of what ``read_image`` reads.
ENDINGS: Final = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Picture:
    """A picture in the size that the vision encoder takes.

    Attributes:
        square: RGB; the processor makes the same pixels of it as of the original.
        aspect: Width over height in which ``square`` looks undistorted.
    """

    square: Image.Image
    aspect: float


def read_pictures(
    files: Sequence[str | Path], earlier: int, processor: Any, limits: Limits
) -> list[Picture]:
    """The pictures of a message.

    Args:
        files: As uploaded; errors name them without their directories.
        earlier: Pictures that the conversation has already.
        processor: Of the export.
        limits: For each and for all.

    Raises:
        UserError: Too many, too large, or not to be read.
    """
    if earlier + len(files) > limits.pictures:
        raise UserError(
            f"The conversation would have {earlier + len(files)} pictures, more than "
            f"{limits.pictures}: send fewer, or begin a new conversation."
        )
    return [_picture(Path(file), processor, limits) for file in files]


def _picture(file: Path, processor: Any, limits: Limits) -> Picture:
    if not file.is_file():
        raise UserError(f"The picture {file.name} is no longer there: send it again.")
    size = file.stat().st_size
    if size > limits.megabytes * 10**6:
        raise UserError(
            f"The picture {file.name} has {size / 10**6:.1f} MB, more than {limits.megabytes}: "
            "send a smaller one."
        )
    try:
        image = read_image(file, file.name, limits.megapixels * 10**6)
    except UserError as error:
        raise UserError(f"The {error}: send another picture.") from error
    side, aspect = processor.image_size, image.width / image.height
    if processor.image_mode == "pad":
        mean = tuple(processor.image_processor.image_mean)
        image, aspect = as_square(image, side, mean), 1.0
    return Picture(image.resize((side, side), Image.Resampling.BICUBIC), aspect)
