"""Conversations in transformers' chat format, checked, with their pictures opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from PIL import Image

from moiie_megatron.data.encode.images import MAX_PIXELS, read_image
from moiie_megatron.data.encode.pixels import as_rgb, upright
from moiie_megatron.utils.errors import UserError

Message = Mapping[str, Any]
"""``{"role": ..., "content": TEXT or [{"type": "image", "image": PICTURE}, {"type": "text",
"text": ...}]}``; a picture is a PIL image or the path of a file."""

_ROLES: Final = ("system", "user", "assistant")


def checked(
    conversation: Sequence[Message], images: Sequence[Any] = ()
) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """The messages for a chat template, and all pictures in the order of their places.

    Args:
        conversation: Ends with a message of the user.
        images: Pictures for image tokens that stand in the texts; then no message has parts of
            type ``image``.

    Raises:
        UserError: Another structure, text that is not Unicode, or a picture that cannot be read,
            which is named by its path, or by its number (from 1) if it has none.
    """
    if not conversation:
        raise UserError("The conversation is empty: give at least one message.")
    pictures: list[Any] = list(images)
    messages = [_message(message, pictures) for message in conversation]
    if len(pictures) > len(images) > 0:
        raise UserError(
            f"The conversation has {len(pictures) - len(images)} pictures among its parts and "
            f"{len(images)} beside it: give all of them in one way."
        )
    if messages[-1]["role"] != "user":
        raise UserError(
            f"The last message is of the role {messages[-1]['role']}: end with one of the user."
        )
    return messages, [_picture(picture, n) for n, picture in enumerate(pictures, start=1)]


def _message(message: Any, pictures: list[Any]) -> dict[str, Any]:
    """The message without its pictures, which are appended to the list."""
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise UserError(f"{_shown(message)} is no message: use a dict with role and content.")
    role, content = message["role"], message["content"]
    if role not in _ROLES:
        raise UserError(f"A message has the role {_shown(role)}: use {', '.join(_ROLES)}.")
    if isinstance(content, str):
        return {"role": role, "content": _text(content)}
    if not isinstance(content, Sequence) or not content:
        raise UserError(f"A message has the content {_shown(content)}: use text or a list.")
    return {"role": role, "content": [_part(part, pictures) for part in content]}


def _part(part: Any, pictures: list[Any]) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": _text(part["text"])}
    if kind == "image":
        picture = part.get("image", part.get("path"))
        if isinstance(picture, (str, Path, Image.Image)):
            pictures.append(picture)
            return {"type": "image"}
    raise UserError(
        f"A message has the part {_shown(part)}: use type text with text, or type image with "
        "image, a PIL image or the path of a file."
    )


def _picture(picture: Any, number: int) -> Image.Image:
    """Upright and in mode RGB."""
    if not isinstance(picture, Image.Image):
        if not Path(picture).is_file():
            raise UserError(f"The image {picture} does not exist: name a file that does.")
        return read_image(Path(picture), str(picture))
    if picture.width * picture.height > MAX_PIXELS:
        raise UserError(
            f"Image {number} has {picture.width} x {picture.height} pixels, more than "
            f"{MAX_PIXELS}: make it smaller."
        )
    try:
        return as_rgb(upright(picture))
    except Exception as error:  # a damaged file can make PIL raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"Image {number} cannot be read ({reason}): replace it.") from error


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"A text has a lone surrogate at position {error.start}: give valid Unicode."
        ) from error
    return text


def _shown(value: Any) -> str:
    return " ".join(str(value)[:80].encode("ascii", "backslashreplace").decode().split())
