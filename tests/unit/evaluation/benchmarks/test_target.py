from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from moiie_megatron.evaluation.benchmarks.environment import find_environment
from moiie_megatron.evaluation.benchmarks.target import (
    ExportTarget,
    find_server,
    model_args,
)
from tests.helpers.user_errors import user_error
from tests.unit.evaluation.benchmarks.stand_in import write_python


@pytest.fixture
def server() -> Iterator[Any]:
    """Has the models that its attribute ``names`` holds."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            names = self.server.names  # type: ignore[attr-defined]
            self.wfile.write(json.dumps({"data": [{"id": name} for name in names]}).encode())

        def log_message(self, *_: Any) -> None:
            pass

    http: Any = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield http
    http.shutdown()
    http.server_close()
    thread.join()


def test_the_model_of_a_server(server: Any) -> None:
    url = f"http://127.0.0.1:{server.server_port}/v1"
    server.names = ["a"]
    assert find_server(url, None, "none") == find_server(url + "/", "a", "none") == "a"
    with user_error("--model", "b", "a"):
        find_server(url, "b", "none")
    server.names = ["a", "b"]
    with user_error("a, b", "--model"):
        find_server(url, None, "none")


def test_a_server_that_is_not_there() -> None:
    with user_error("http://127.0.0.1:9/v1/models", "start the server"):
        find_server("http://127.0.0.1:9/v1", None, "none")


def test_identity_changes_with_the_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"a")
    target = ExportTarget(tmp_path, expert="shared.0")
    before = target.identity()
    assert before == target.identity()
    (tmp_path / "model.safetensors").write_bytes(b"ab")
    assert target.identity() != before
    assert ExportTarget(tmp_path).identity()["expert"] is None
    arguments = model_args(target.arguments() | {"answers": None})
    assert arguments == f"pretrained={tmp_path},device=auto,dtype=auto,expert=shared.0"


def test_a_name_that_lmms_eval_would_divide(tmp_path: Path) -> None:
    with user_error(tmp_path / "a,b", ","):
        ExportTarget(tmp_path / "a,b").arguments()


CHECKED = {"version": "0.7.3", "tasks": ["pope"], "problem": ""}


@pytest.mark.parametrize(
    ("printed", "parts"),
    [
        (CHECKED | {"version": None}, ["has no lmms-eval"]),
        (CHECKED | {"problem": "torchvision: nms"}, ["torchvision: nms"]),
        ([], ["make eval-env"]),
    ],
)
def test_an_environment_that_does_not_fit(tmp_path: Path, printed: Any, parts: list[str]) -> None:
    python = write_python(tmp_path, f"print({json.dumps(printed)!r})")
    with user_error(python, "make eval-env", *parts):
        find_environment(str(python), {})


def test_an_environment(tmp_path: Path) -> None:
    python = write_python(tmp_path, f"print({json.dumps(CHECKED)!r})")
    found = find_environment(None, {"MOIIE_EVAL_PYTHON": str(python)})
    assert (found.python, found.version, found.tasks) == (python, "0.7.3", ("pope",))
    with user_error(tmp_path / "none", "make eval-env"):
        find_environment(str(tmp_path / "none"), {})
