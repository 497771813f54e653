"""PNG files without their metadata."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Final

SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
# What the pixels need, without tRNS: transparency is dropped with the alpha channel.
_CRITICAL: Final = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_XMP: Final = b"XML:com.adobe.xmp\0\0"  # then a zero: not compressed


def without_metadata(content: bytes) -> bytes:
    """The file with the chunks that hold pixels and, where undamaged, the orientation.

    PIL refuses a picture for its metadata: a wrong checksum, or a profile or text of more than
    1 MiB.  Its limits are variables of its module, so raising them would change them for every
    other user in the process, and a wrong checksum would still be refused.

    Args:
        content: A PNG file; from where it is damaged or cut, the rest is kept as it is.
    """
    return SIGNATURE + b"".join(_needed_chunks(content))


def _needed_chunks(content: bytes) -> Iterator[bytes]:
    position = len(SIGNATURE)
    while len(content) - position >= 12:
        length, kind = struct.unpack_from(">I4s", content, position)
        chunk = content[position : position + 12 + length]
        if len(chunk) < 12 + length:
            break
        if kind in _CRITICAL or _holds_orientation(kind, chunk):
            yield chunk
        position += len(chunk)
    yield content[position:]


def _holds_orientation(kind: bytes, chunk: bytes) -> bool:
    if kind != b"eXIf" and not (kind == b"iTXt" and chunk.startswith(_XMP, 8)):
        return False
    return zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
