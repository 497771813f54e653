"""tools/chat.py up to the page, which tests/chat opens in a browser."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest

from tests.helpers.launch import ROOT
from tests.helpers.user_errors import user_error


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The program, in an environment that seems to have gradio."""
    spec = importlib.util.spec_from_file_location("chat_tool", ROOT / "tools" / "chat.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "gradio", ModuleType("gradio"))
    return module


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["nowhere"], ("nowhere", "no directory")),
        (["nowhere", "--model", "a"], ("--model is a", "nowhere")),
        (["http://127.0.0.1:9/v1", "--expert", "text"], ("--expert is text", "server")),
        (["http://127.0.0.1:9/v1"], ("http://127.0.0.1:9/v1", "start")),
        (["nowhere", "--port", "0"], ("--port", 0)),
        (["nowhere", "--max-pictures", "0"], ("--max-pictures", 0)),
    ],
)
def test_refusals(
    words: list[str], parts: tuple[Any, ...], chat: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["chat.py", *words])
    with pytest.MonkeyPatch.context() as patch, user_error(*parts):
        patch.setitem(sys.modules, "moiie_megatron.chat.page", ModuleType("page"))
        patch.setitem(sys.modules, "moiie_megatron.chat.server_page", ModuleType("server_page"))
        for name in ("page", "server_page"):
            module = sys.modules[f"moiie_megatron.chat.{name}"]
            module.build_page = module.build_server_page = None  # type: ignore[attr-defined]
        chat.main()


def test_without_gradio(chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(sys, "argv", ["chat.py", "nowhere"])
    with user_error("gradio", "moiie-megatron[chat]"):
        chat.main()
