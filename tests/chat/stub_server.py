"""An OpenAI-compatible server that says how many words and pictures it was sent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:  # the name that http.server calls
        self._send(200, "application/json", {"data": [{"id": "stub"}]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        parts = [part for message in request["messages"] for part in _parts(message)]
        text = " ".join(part["text"] for part in parts if part["type"] == "text")
        if "refuse" in text:
            self._send(400, "application/json", {"error": {"message": "The prompt is refused."}})
            return
        pictures = sum(part["type"] == "image_url" for part in parts)
        answer = f"{len(text.split())} words and {pictures} pictures"
        pieces = [{"choices": [{"index": 0, "delta": {"content": c}}]} for c in answer]
        lines = [f"data: {json.dumps(piece)}\n\n" for piece in pieces] + ["data: [DONE]\n\n"]
        self._send(200, "text/event-stream", "".join(lines))

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, code: int, kind: str, content: Any) -> None:
        body = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


@contextmanager
def stub_server() -> Iterator[str]:
    """Its URL while the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
