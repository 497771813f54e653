"""The page in Chromium: a picture, an answer, experts by layer; and people who mean harm."""

from __future__ import annotations

import json
import struct
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chat.browser import SIZES, opened, send, served
from tests.helpers.tiny_export import picture

ANSWER_SECONDS = 30


@pytest.fixture(scope="module")
def address(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("log") / "chat.log"
    options = ["--device", "cpu", "--max-megabytes", 2, "--max-pictures", 2]
    options += ["--max-new-tokens", 24]
    with served(export, *options, port=7911, log=log) as found:
        yield found
    # Gradio prints what it refuses itself.
    assert "moiie_megatron" not in log.read_text()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, and what only looks like one."""
    folder = tmp_path_factory.mktemp("files")
    picture(0, 300, 200).save(folder / "photo.png")
    whole = (folder / "photo.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("no picture")
    (folder / "empty.jpg").touch()
    (folder / "drawing.svg").write_text(
        "<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    )
    (folder / "svg.png").write_bytes((folder / "drawing.svg").read_bytes())
    (folder / "large.png").write_bytes(whole + bytes(3_000_000))
    head = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunks = (b"IHDR", head), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b"")
    (folder / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in chunks
        )
    )
    return folder


def status_after(page: Any) -> str:
    """The sentence that the page says in place of an answer."""
    page.wait_for_function(
        "document.querySelector('#status').innerText.trim() !== ''", timeout=ANSWER_SECONDS * 1000
    )
    text: str = page.inner_text("#status").strip()
    assert "\n" not in text and text.endswith("."), text
    return text


def answered(page: Any) -> None:
    ready = "document.querySelector('.experts') || document.querySelector('#status').innerText"
    page.wait_for_function(ready, timeout=ANSWER_SECONDS * 1000)
    assert page.inner_text("#status") == ""


@pytest.mark.parametrize("size", SIZES)
def test_a_picture_an_answer_and_its_experts(
    size: str, browser: Any, address: str, files: Path, tmp_path: Path
) -> None:
    with opened(browser, address, size) as page:
        send(page, "What is <b>this</b> & that?", files / "photo.png")
        answered(page)
        page.wait_for_timeout(500)
        text = page.inner_text("#experts")
        assert "Decoder layer 3, MoE layer 2 of 2" in text
        assert "Picture 1:" in text and "Prompt" in text and "Answer" in text
        assert page.locator("#experts .grid img").count() == 2
        natural = page.evaluate(
            "[...document.querySelectorAll('#experts .grid img')].map(i => i.naturalWidth)"
        )
        assert natural == [8, 2]
        names = page.locator("#experts small").all_inner_texts()
        page.fill("input[type=number] >> nth=-1", "1")
        page.keyboard.press("Enter")
        page.wait_for_function(
            "document.querySelector('#experts').innerText.includes('Decoder layer 1')"
        )
        assert page.locator("#experts small").all_inner_texts() != names
        # Nothing is wider than the window.
        overflow = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert overflow <= 0
        page.click("text=New conversation")
        page.wait_for_selector(".experts", state="detached")


def test_hostile_messages_get_a_sentence(browser: Any, address: str, files: Path) -> None:
    """Files that are no pictures, too many, texts too long: then a good message is answered."""
    refused = {
        ("a", "cut.png"): "cut.png",
        ("a", "text.png"): "text.png",
        ("a", "empty.jpg"): "empty.jpg",
        ("a", "svg.png"): "svg.png",
        ("a", "bomb.png"): "bomb.png",
        ("a", "photo.png", "photo.png", "photo.png"): "3 pictures",
        ("x" * 9000,): "9000 characters",
        ("x" * 500,): "positions",
        ("an <image>",): "<image>",
        ("<img src=x onerror=alert(1)>" * 300,): "8400 characters",
    }
    for (text, *names), part in refused.items():
        with opened(browser, address) as page:
            send(page, text, *(files / name for name in names))
            assert part in status_after(page)
            assert page.input_value("textarea") == text
    with opened(browser, address) as page:
        send(page, "Hi?")
        answered(page)


def test_files_of_other_kinds_and_sizes_are_not_taken(
    browser: Any, address: str, files: Path
) -> None:
    for name in ("large.png", "drawing.svg"):
        with opened(browser, address) as page:
            page.set_input_files("input[type=file]", str(files / name))
            page.wait_for_timeout(1500)
            assert page.locator("[data-testid=toast-body], .toast-body").count() >= 1, name


def test_people_at_once(browser: Any, address: str, files: Path) -> None:
    """Ten windows ask at the same time, and some of them leave: everybody else is answered."""
    contexts = [browser.new_context() for _ in range(10)]
    pages = [context.new_page() for context in contexts]
    for page in pages:
        page.goto(address)
        page.wait_for_selector("textarea", timeout=60_000)
    for number, page in enumerate(pages):
        page.fill("textarea", f"Question {number}?")
    for page in pages:
        page.keyboard.press("Enter")
    for context in contexts[::3]:
        context.close()
    for number, page in enumerate(pages):
        if number % 3:
            answered(page)
            tokens = "".join(page.locator("#experts b").all_inner_texts())
            assert f"Question {number}?" in tokens.replace("\xa0", " ")
    for number, context in enumerate(contexts):
        if number % 3:
            context.close()


def _post(address: str, path: str, body: bytes, kind: str = "application/json") -> int:
    request = urllib.request.Request(
        f"{address.rstrip('/')}{path}", data=body, headers={"Content-Type": kind}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            response.read()
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return 0  # the server has closed the connection before the end of the body


def _events(address: str, session: str) -> str:
    """What the queue says to a session, up to the end of its event."""
    text, end = "", time.monotonic() + 60
    url = f"{address.rstrip('/')}/gradio_api/queue/data?session_hash={session}"
    with urllib.request.urlopen(url, timeout=60) as response:
        for line in response:
            text += line.decode()
            if "process_completed" in text or time.monotonic() > end:
                break
    return text


def test_requests_that_no_browser_sends(address: str, browser: Any) -> None:
    """Large bodies, broken JSON, files of the server, values of wrong types."""
    boundary = b"--x\r\nContent-Disposition: form-data; name=files; filename=a.png\r\n\r\n"
    large = boundary + bytes(100_000_000) + b"\r\n--x--\r\n"
    kind = "multipart/form-data; boundary=x"
    assert _post(address, "/gradio_api/upload", large, kind) in (0, 413)
    for body in (b"{", b"[]", b'{"fn_index": 99}', b'{"data": 7, "fn_index": 0}', bytes(1000)):
        code = _post(address, "/gradio_api/queue/join", body)
        assert 400 <= code < 600, (body, code)
    secret = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    values: list[list[Any]] = [
        [{"text": "a", "files": [secret]}, [], None, 5, 0, 1, None],
        [{"text": "a" * 10**6, "files": []}, [], None, 5, 0, 1, None],
        [{"text": "a", "files": []}, [], None, 10**9, 0, 1, None],
        [{"text": "a", "files": []}, [], None, 5, 1e308, 1, None],
        [{"text": "a", "files": []}, "history", None, "many", None, {}, None],
        [None, None, None, None, None, None, None],
    ]
    for number, data in enumerate(values):
        session = f"session{number}"
        event = {"data": data, "fn_index": 0, "session_hash": session}
        code = _post(address, "/gradio_api/queue/join", json.dumps(event).encode())
        if code == 200:
            assert "root:" not in _events(address, session)
    with opened(browser, address) as page:
        send(page, "Still there?")
        answered(page)
