"""Collected where ``MOIIE_TEST_CHROMIUM`` names the directory of a browser (make test-chat)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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
