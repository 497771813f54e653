"""The page as a program, and windows of a browser that open it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.helpers.launch import ROOT

SIZES = {"wide": (1280, 900), "narrow": (390, 840)}


@contextmanager
def served(*arguments: object, port: int, log: Path) -> Iterator[str]:
    """The address of a page that tools/chat.py serves while the block runs."""
    command = [sys.executable, ROOT / "tools" / "chat.py", *map(str, arguments), "--port", port]
    with log.open("w") as output:
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        )
    try:
        for _ in range(600):
            found = re.search(r"Running on local URL: +(\S+)", log.read_text())
            if found or process.poll() is not None:
                break
            time.sleep(0.2)
        assert found and process.poll() is None, log.read_text()[-4000:]
        yield found[1]
        assert process.poll() is None, log.read_text()[-4000:]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


@contextmanager
def opened(browser: Any, address: str, size: str = "wide") -> Iterator[Any]:
    """The page in a new window; requests to other hosts and errors of scripts fail the test."""
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height})
    page = context.new_page()
    others, errors = [], []
    page.on("request", lambda request: others.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("dialog", lambda dialog: errors.append(dialog.message))
    page.goto(address)
    page.wait_for_selector("textarea", timeout=60_000)
    yield page
    context.close()
    local = (address.rstrip("/"), "data:", "blob:")
    assert [url for url in others if not url.startswith(local)] == []
    assert errors == []


def send(page: Any, text: str, *files: Path) -> None:
    if files:
        page.set_input_files("input[type=file]", [str(file) for file in files])
        page.wait_for_timeout(1500)
    page.fill("textarea", text)
    page.keyboard.press("Enter")
