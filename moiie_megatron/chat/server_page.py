"""The page for a model behind an OpenAI-compatible server.  Needs gradio and openai."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, Final

import gradio as gr

from moiie_megatron.chat.limits import Limits
from moiie_megatron.chat.pictures import ENDINGS
from moiie_megatron.utils.errors import UserError

_NOT_ANSWERED: Final = "Not answered: "
_log = logging.getLogger(__name__)


def build_server_page(url: str, model: str, key: str, limits: Limits, title: str) -> gr.Blocks:
    """Gradio's chat page over a server.

    It is ``gr.load_chat``, but for errors: a sentence in the place of the answer, which later
    requests leave out.

    Args:
        url: ``http://HOST:PORT/v1``.
        model: The name that the server gives it.
        key: For the server.
        limits: On files, messages and the queue; the server has its own on prompts.
        title: Of the page.
    """
    page = gr.load_chat(
        url,
        model=model,
        token=key,
        file_types="image",
        title=title,
        textbox=gr.MultimodalTextbox(
            file_types=list(ENDINGS),
            file_count="multiple",
            max_plain_text_length=limits.characters,
        ),
        analytics_enabled=False,
        delete_cache=(600, 3600),
        api_visibility="private",
    )
    ask = page.fn  # what load_chat has made of the URL

    def ask_within_limits(message: Mapping[str, Any], history: list[Any]) -> Iterator[str]:
        try:
            limits.check_text(str(message.get("text") or ""))
            answered = _answered(history)
            _check_number(message, answered, limits)
            yield from ask(message, answered)
        except UserError as error:
            yield f"{_NOT_ANSWERED}{error}"
        except Exception as error:  # of the client, which has many
            _log.warning("The server has not answered: %s", error)
            yield f"{_NOT_ANSWERED}{' '.join(str(error).split())[:300]}"

    page.fn = ask_within_limits
    page.queue(max_size=limits.waiting)
    return page


def _answered(history: list[Any]) -> list[Any]:
    """The history without messages that were not answered."""
    kept: list[Any] = []
    for message in history:
        if message["role"] == "assistant" and _text(message).startswith(_NOT_ANSWERED):
            while kept and kept[-1]["role"] == "user":
                del kept[-1]
        else:
            kept.append(message)
    return kept


def _check_number(message: Mapping[str, Any], history: list[Any], limits: Limits) -> None:
    contents = [part for one in history for part in _parts(one)]
    pictures = len(message.get("files") or []) + sum("file" in part for part in contents)
    if pictures > limits.pictures:
        raise UserError(
            f"The conversation would have {pictures} pictures, more than {limits.pictures}: send "
            "fewer, or begin a new conversation."
        )


def _text(message: Mapping[str, Any]) -> str:
    return "".join(str(part.get("text") or "") for part in _parts(message))


def _parts(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = message["content"]
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [part for part in content if isinstance(part, Mapping)]
