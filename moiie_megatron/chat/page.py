"""The page for a model in this process.  Needs gradio."""

from __future__ import annotations

import html
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import gradio as gr

from moiie_megatron.chat.conversation import Chat, Conversation, Tokens
from moiie_megatron.chat.expert_view import expert_view
from moiie_megatron.chat.pictures import ENDINGS
from moiie_megatron.utils.errors import UserError

_FONTS: Final = ["ui-sans-serif", "system-ui", "sans-serif"]
_MONO: Final = ["ui-monospace", "Menlo", "Consolas", "monospace"]
_HINT: Final = (
    "<p style='opacity:.7'>After an answer, every token is shown here with its experts.</p>"
)
STYLE: Final = """
#status { color: #b3261e; }
#history .message-buttons-right { display: none; }
.dark #status { color: #ff8a80; }
footer { display: none !important; }
"""
_log = logging.getLogger(__name__)

History = list[dict[str, Any]]


def theme() -> gr.themes.Base:
    """Fonts of the reader's system: nothing is loaded from elsewhere."""
    return gr.themes.Default(font=_FONTS, font_mono=_MONO, primary_hue="blue")


def build_page(chat: Chat, title: str) -> gr.Blocks:
    """The page.

    Args:
        chat: Answers, one message at a time.
        title: Of the page.
    """
    layers = len(chat.model.model.config.moe_layers)
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"## {title}")
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                history = gr.Chatbot(show_label=False, height=440, buttons=[], elem_id="history")
                status = gr.HTML("", elem_id="status", padding=False)
                box = gr.MultimodalTextbox(
                    file_types=list(ENDINGS),
                    file_count="multiple",
                    placeholder="Write a message; add pictures with the clip",
                    show_label=False,
                    max_plain_text_length=chat.limits.characters,
                )
                with gr.Accordion("Settings", open=False):
                    longest = gr.Slider(
                        1,
                        chat.limits.new_tokens,
                        chat.usual_length,
                        step=1,
                        label="Longest answer (tokens)",
                    )
                    temperature = gr.Slider(
                        0, 2, 0, step=0.05, label="Temperature (0: the most likely tokens)"
                    )
                new = gr.Button("New conversation", variant="secondary")
            with gr.Column(scale=2, min_width=320, visible=chat.has_experts):
                layer = gr.Slider(
                    1,
                    max(layers, 2),
                    layers or 1,
                    step=1,
                    label="MoE layer",
                    visible=layers > 1,
                    buttons=[],
                )
                view = gr.HTML(_HINT, padding=False, elem_id="experts")
        conversation = gr.State(Conversation(), time_to_live=3600)
        tokens = gr.State(None, time_to_live=3600)
        answers = _Answers(chat)
        asked = box.submit(
            answers.answer,
            [box, history, conversation, longest, temperature, layer, tokens],
            [box, history, conversation, tokens, view, status],
            concurrency_limit=1,
            concurrency_id="answers",
            show_progress_on=history,
            api_visibility="private",
        )
        box.stop(lambda: _box(None), None, box, cancels=[asked], api_visibility="private")
        layer.input(draw, [tokens, layer], view, show_progress="hidden", api_visibility="private")
        for begin_again in (new.click, history.clear):
            begin_again(
                lambda: (_box(None), [], Conversation(), None, _HINT, ""),
                None,
                [box, history, conversation, tokens, view, status],
                cancels=[asked],
                api_visibility="private",
            )
    page.queue(max_size=chat.limits.waiting)
    return page


def draw(tokens: Tokens | None, layer: float) -> str:
    """The view of a layer (from 1)."""
    if tokens is None:
        return _HINT
    number = min(max(int(layer), 1), len(tokens.routing.layers)) - 1
    return expert_view(tokens, number)


class _Answers:
    def __init__(self, chat: Chat) -> None:
        self._chat = chat

    def answer(  # what gradio passes: one argument for each input
        self,
        message: Mapping[str, Any] | None,
        history: History,
        conversation: Conversation,
        longest: float,
        temperature: float,
        layer: float,
        tokens: Tokens | None,
    ) -> Iterator[tuple[Any, ...]]:
        """New values of box, history, conversation, tokens, view and status."""
        message = message or {"text": "", "files": []}
        text, files = str(message.get("text") or ""), list(message.get("files") or [])
        shown = [*history, *_shown(text, files)]
        old = conversation, tokens
        yield _box(None, running=True), shown, *old, gr.skip(), ""
        try:
            if not all(isinstance(value, (int, float)) for value in (longest, temperature, layer)):
                raise UserError("The settings are no numbers: load the page again.")
            replies = self._chat.reply(
                conversation, text, files, new_tokens=int(longest), temperature=float(temperature)
            )
            for reply in replies:
                answered = [*shown, {"role": "assistant", "content": reply.text}]
                if reply.conversation is None:
                    yield gr.skip(), answered, *old, gr.skip(), ""
                else:
                    drawn = draw(reply.tokens, layer)
                    yield _box(None), answered, reply.conversation, reply.tokens, drawn, ""
        except UserError as error:
            yield _box(message), history, *old, gr.skip(), html.escape(str(error))
        except Exception:
            _log.exception("A message could not be answered")
            yield (
                _box(message),
                history,
                *old,
                gr.skip(),
                "The model has failed: the reason is in the output of the program.",
            )


def _box(message: Mapping[str, Any] | None, running: bool = False) -> Any:
    """The box with another message in it; with a button to stop what is running."""
    return gr.MultimodalTextbox(
        value=None if message is None else dict(message),
        submit_btn=not running,
        stop_btn=running,
    )


def _shown(text: str, files: Sequence[str | Path]) -> History:
    """A message as the history shows it."""
    parts: list[Any] = [{"path": str(file)} for file in files]
    return [{"role": "user", "content": part} for part in [*parts, *([text] if text else [])]]
