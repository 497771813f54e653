"""An OpenAI-compatible server in this process, whose answers a function gives."""

from __future__ import annotations

import base64
import binascii
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

Messages = list[dict[str, Any]]


class StubServer:
    """Serves ``/v1/models`` and ``/v1/chat/completions``.

    Args:
        answer: From the messages, whose pictures are PIL images, to the text; what it raises is
            returned as a server's error.
        models: Names that it has.

    Attributes:
        url: Ends in ``/v1``.
        requests: Those of ``/v1/chat/completions`` so far.
        at_once: The largest number of them that have been answered at a time.
    """

    def __init__(self, answer: Callable[[Messages], str], models: tuple[str, ...]) -> None:
        self.answer, self.models = answer, models
        self.requests: list[dict[str, Any]] = []
        self.at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._send(200, {"object": "list", "data": [{"id": name} for name in stub.models]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._send(*stub.complete(body))

            def log_message(self, *_: Any) -> None:
                pass

            def _send(self, status: int, value: Any) -> None:
                content = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and content of an answer."""
        with self._lock:
            self.requests.append(body)
            self._now += 1
            self.at_once = max(self.at_once, self._now)
        try:
            if body["model"] not in self.models:
                return 404, {"error": {"message": f"no model {body['model']}"}}
            text = self.answer([_with_pictures(message) for message in body["messages"]])
        except Exception as error:
            return 400, {"error": {"message": f"{type(error).__name__}: {error}"}}
        finally:
            with self._lock:
                self._now -= 1
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        return 200, {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [choice],
            "usage": usage,
        }

    def serve(self) -> None:
        self._server.serve_forever(poll_interval=0.05)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def serving(
    answer: Callable[[Messages], str], models: tuple[str, ...] = ("tiny",)
) -> Iterator[StubServer]:
    """The server, until the block ends."""
    server = StubServer(answer, models)
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join()


def text_of(messages: Messages) -> str:
    """All texts of a conversation, in order."""
    parts: list[str] = []
    for message in messages:
        content = message["content"]
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts += [part["text"] for part in content if part["type"] == "text"]
    return "\n".join(parts)


def _with_pictures(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose data URIs are PIL images, as transformers' chat messages have them."""
    if isinstance(message["content"], str):
        return message
    return {**message, "content": [_part(part) for part in message["content"]]}


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] != "image_url":
        return part
    try:
        content = base64.b64decode(part["image_url"]["url"].partition(",")[2], validate=True)
    except binascii.Error as error:
        raise ValueError("a picture that is no base64") from error
    return {"type": "image", "image": Image.open(io.BytesIO(content)).convert("RGB")}
