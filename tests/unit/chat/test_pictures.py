"""Files that people send as pictures."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moiie_megatron.chat.conversation import Chat, Conversation
from moiie_megatron.utils.errors import UserError
from tests.helpers.tiny_export import picture
from tests.helpers.user_errors import user_error


def _bomb(path: Path, side: int = 50_000) -> None:
    """A small PNG that says it has many pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(bytes(99))), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def test_hostile_files(chat: Chat, tmp_path: Path) -> None:
    """Each is one sentence that names the file, and not its directory."""
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    picture(0, 300, 300).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:20_000])
    (tmp_path / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / "large.png").write_bytes(bytes(1_000_001))
    Image.fromarray(np.zeros((1001, 1000), np.uint8)).save(tmp_path / "pixels.png")
    _bomb(tmp_path / "bomb.png")
    names = [path.name for path in tmp_path.iterdir() if path.name != "whole.png"]
    assert len(names) == 8
    for name in [*names, "missing.png"]:
        with pytest.raises(UserError) as caught:
            list(chat.reply(Conversation(), "a", [tmp_path / name]))
        sentence = str(caught.value)
        assert name in sentence and "\n" not in sentence and str(tmp_path) not in sentence


def test_too_many_pictures(chat: Chat, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    file = tmp_path / "a.png"
    with user_error(3, 2):
        list(chat.reply(Conversation(), "a", [file] * 3))
    *_, last = chat.reply(Conversation(), "a", [file] * 2, new_tokens=1)
    assert last.conversation is not None
    with user_error(3, 2):
        list(chat.reply(last.conversation, "a", [file]))


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_formats(ending: str, chat: Chat, tmp_path: Path) -> None:
    picture(0).save(tmp_path / f"a.{ending}")
    *_, last = chat.reply(Conversation(), "", [tmp_path / f"a.{ending}"], new_tokens=1)
    assert last.conversation is not None
