"""Collected where ``MOIIE_TEST_CHROMIUM`` names the directory of a browser (make test-chat)."""

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

import pytest

from tests.helpers.launch import ROOT
from tests.helpers.tiny_export import write_export

CHROMIUM = os.environ.get("MOIIE_TEST_CHROMIUM")
if CHROMIUM is None:
    collect_ignore_glob = ["*"]


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("chat") / "tiny")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium without a window; pages that ask for another host fail."""
    from playwright.sync_api import sync_playwright

    folder = Path(str(CHROMIUM)).absolute()
    variables = {
        "LD_LIBRARY_PATH": str(folder / "lib"),
        "FONTCONFIG_FILE": str(folder / "fonts.conf"),
    }
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=folder / "chromium",
            args=["--no-sandbox"],
            env={**os.environ, **variables},
        )
        yield browser
        browser.close()


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
