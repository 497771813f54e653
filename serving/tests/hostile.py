"""Requests that a server must refuse or survive, and the status that each may have."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
from PIL import Image
from server import NAME

Request = Callable[[httpx.AsyncClient], Awaitable[int | None]]  # None: the client went away


def data_uri(content: bytes) -> str:
    """A PNG picture as its own address."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def png(side: int = 28) -> bytes:
    """A valid picture."""
    buffer = io.BytesIO()
    Image.effect_noise((side, side), 60).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def bomb(side: int = 30_000) -> bytes:
    """A grey picture of 900 million pixels in less than a megabyte."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    row = b"\0" * (side + 1)
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def chat(content: Any, **changes: Any) -> dict[str, Any]:
    """The body of a chat request."""
    messages = [{"role": "user", "content": content}]
    return {"model": NAME, "messages": messages, "max_tokens": 8, "temperature": 0} | changes


def image(address: str) -> dict[str, Any]:
    """An image in a message."""
    return {"type": "image_url", "image_url": {"url": address}}


TEXT = {"type": "text", "text": "Which digit is at the top left?"}


def post(body: Any, path: str = "/v1/chat/completions") -> Request:
    """A request that waits for its answer."""

    async def request(client: httpx.AsyncClient) -> int:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        return (await client.post(path, content=content, headers=headers)).status_code

    return request


def cancelled(body: dict[str, Any], after: int) -> Request:
    """A streaming request whose client goes away after some pieces of the answer."""

    async def request(client: httpx.AsyncClient) -> None:
        path = "/v1/chat/completions"
        async with client.stream("POST", path, json=body | {"stream": True}) as response:
            assert response.status_code == 200
            pieces = response.aiter_lines()
            for _ in range(after):
                await anext(pieces, None)

    return request


def broken_off(client_port: int) -> Request:
    """Half of a request, then the connection is closed."""

    async def request(_: httpx.AsyncClient) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", client_port)
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n"
        writer.write(head.encode() + b'{"model": "demo", "mess')
        await writer.drain()
        writer.close()

    return request


def hostile(port: int) -> dict[str, tuple[Request, set[int | None]]]:
    """Requests by name, with the statuses that are right for them."""
    picture = png()
    good = [image(data_uri(picture)), TEXT]
    refused: set[int | None] = {400}
    failed: set[int | None] = {400, 500}  # vLLM 0.32 has no status of its own for these
    invalid: set[int | None] = {400, 422}
    served: set[int | None] = {200}
    long_answer = {"max_tokens": 150, "ignore_eos": True}
    return {
        "broken PNG": (post(chat([image(data_uri(picture[:-200])), TEXT])), refused),
        "no picture": (post(chat([image(data_uri(b"<svg/>" * 50)), TEXT])), refused),
        "no base64": (post(chat([image("data:image/png;base64,%%%"), TEXT])), refused),
        "data URI of 24 MB": (post(chat([image(data_uri(b"\0" * 18_000_000)), TEXT])), refused),
        "900 million pixels": (post(chat([image(data_uri(bomb())), TEXT])), failed),
        "five pictures of three": (post(chat([image(data_uri(picture))] * 5)), refused),
        "file of the server": (post(chat([image("file:///etc/passwd"), TEXT])), failed),
        "unknown scheme": (post(chat([image("gopher://127.0.0.1/x"), TEXT])), refused),
        # Of the template, which may write it down as it is.
        "unknown role": (post(chat([TEXT]) | {"messages": [{"role": "wizard"}]}), {200, 400}),
        "picture without a placeholder": (
            post(chat(good, chat_template="{{ messages[0]['role'] }}")),
            refused,
        ),
        "placeholder without a picture": (post(chat("<image> is an image token")), served),
        "prompt too long": (post(chat("top left " * 2000)), refused),
        "answer too long": (post(chat([TEXT], max_tokens=10**6)), refused),
        "no messages": (post({"model": NAME, "messages": []}), refused),
        "messages of a wrong type": (post({"model": NAME, "messages": "hello"}), invalid),
        "temperature of a wrong type": (post(chat([TEXT], temperature="hot")), invalid),
        "audio": (post(chat([{"type": "input_audio", "input_audio": {}}])), invalid),
        "no JSON": (post(b"{" * 1000), invalid),
        "unknown model": (post(chat([TEXT], model="another")), {404}),
        "ids outside the vocabulary": (
            post({"model": NAME, "prompt": [1, 10**6]}, "/v1/completions"),
            refused,
        ),
        "image ids without a picture": (
            post(
                {"model": NAME, "prompt": [1, 4, 8, 7, 7, 7, 8], "max_tokens": 4}, "/v1/completions"
            ),
            served,
        ),
        "options of the processor": (
            post(chat(good, mm_processor_kwargs={"num_image_tokens": 3, "do_resize": False})),
            {200, 400},
        ),
        "stream cancelled at once": (cancelled(chat(good, **long_answer), 0), {None}),
        "stream cancelled later": (cancelled(chat(good, **long_answer), 9), {None}),
        "request broken off": (broken_off(port), {None}),
    }
