"""The page for a model behind an OpenAI-compatible server.  Needs gradio and openai."""

from __future__ import annotations

import gradio as gr

from moiie_megatron.chat.limits import Limits
from moiie_megatron.chat.pictures import ENDINGS


def build_server_page(url: str, model: str, key: str, limits: Limits, title: str) -> gr.Blocks:
    """Gradio's own chat page over a server.

    Args:
        url: ``http://HOST:PORT/v1``.
        model: The name that the server gives it.
        key: For the server.
        limits: On files and on the queue; the server has its own on prompts.
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
    page.queue(max_size=limits.waiting)
    return page
