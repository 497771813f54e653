"""The page over an OpenAI-compatible server, in Chromium."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.chat.browser import opened, send, served
from tests.chat.stub_server import stub_server
from tests.helpers.tiny_export import picture


def test_a_server_answers_and_refuses(browser: Any, tmp_path: Path) -> None:
    picture(0, 60, 40).save(tmp_path / "photo.png")
    with (
        stub_server() as url,
        served(url, port=7912, log=tmp_path / "chat.log") as address,
        opened(browser, address) as page,
    ):
        send(page, "What is this?", tmp_path / "photo.png")
        page.wait_for_selector("text=3 words and 1 pictures", timeout=30_000)
        send(page, "refuse it")
        page.wait_for_selector("text=The prompt is refused.", timeout=30_000)
        send(page, "And now?")
        page.wait_for_selector("text=/words and 1 pictures/ >> nth=1", timeout=30_000)
