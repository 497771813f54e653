"""The tokenizer's own chat template, and which of the text that it writes is trainable."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Final

from moiie_megatron.config.families import template_names
from moiie_megatron.config.messages import listed
from moiie_megatron.data.encode.chat_jinja import own_template, tokenizer_jinja
from moiie_megatron.data.encode.marker_templates import bos_text
from moiie_megatron.data.encode.segments import Segment
from moiie_megatron.data.encode.tokenizers import Tokenizer
from moiie_megatron.data.records.record import PLACEHOLDER, Turn
from moiie_megatron.utils.errors import UserError

# Two rounds, of words that no template writes by itself.
_SAMPLE: Final = (
    Turn("user", "kiwi"),
    Turn("assistant", "plum"),
    Turn("user", "quince"),
    Turn("assistant", "fig"),
)
# Roles whose content is given as a list of parts: the first choice that serves is taken.
_LISTS: Final = ((), ("system", "user", "assistant"), ("system", "user"), ("user",))


class UnusableTemplate(UserError):
    """A chat template, or a conversation in it, that cannot be trained on.

    Attributes:
        reason: What is wrong.
    """

    def __init__(self, reason: str) -> None:
        built_in = listed(name for name in template_names() if name != "tokenizer")
        super().__init__(f"{reason}: use {built_in} as stage.template.")
        self.reason = reason


class TokenizerTemplate:
    """The backbone's own Jinja chat template, rendered in transformers' sandbox.

    The trainable text of an assistant turn is what the rendered text gains after the generation
    prompt.  If a token ends the turn, white space after that token belongs to the next header.

    A template that takes the content of a message as a list of parts gets one.  The date is fixed,
    and reasoning is switched off (``enable_thinking``).  Some templates of reasoning models then
    write an empty block of reasoning before the last answer only, so the conversation is rendered
    once as a whole, and every answer is trained as it is written there.

    Raises:
        UnusableTemplate: No chat template, one that does not write the text of the turns, or one
            that rewrites earlier turns, so that no span can be found; checked at construction
            with a conversation of two rounds.
    """

    def __init__(self, tokenizer: Tokenizer, image_token: str = PLACEHOLDER) -> None:
        if tokenizer.chat_template is None:
            raise UnusableTemplate(
                "stage.template is tokenizer but the tokenizer has no chat template"
            )
        own = own_template(tokenizer.chat_template)
        self._special_tokens = tokenizer.special_tokens
        self._bos = ""  # what this class adds in front of the template's text
        self.jinja = ""
        lists = self._choose_lists(own, image_token)
        bos = bos_text(tokenizer)
        if not self._text(_SAMPLE[:1], add_generation_prompt=True).startswith(bos):
            self._bos = bos
        self.jinja = tokenizer_jinja(own, self._bos, image_token, lists)
        self.render(_SAMPLE)

    def _choose_lists(self, own: str, image_token: str) -> Sequence[str]:
        """The roles whose content the template wants as a list; ``jinja`` is left with them."""
        refused: UnusableTemplate | None = None
        for lists in _LISTS:
            self.jinja = tokenizer_jinja(own, "", image_token, lists)
            try:
                text = self._text(_SAMPLE, add_generation_prompt=False)
            except UnusableTemplate as error:
                refused = refused or error
                continue
            # A list that is written as it stands is none that the template understands.
            if all(turn.text in text for turn in _SAMPLE) and "'type':" not in text:
                return lists
        raise refused or UnusableTemplate(
            "The tokenizer's chat template does not write the text of the turns"
        )

    def render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> list[Segment]:
        segments: list[Segment] = []
        whole = self._text(turns, add_generation_prompt)
        if any(t.role == "system" and t.text.strip() not in whole for t in turns):
            raise UnusableTemplate("The tokenizer's chat template leaves the system turn out")
        done = 0  # characters that the segments already cover
        for i, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            start, trainable = self._answer(turns[: i + 1], whole)
            if start < done:
                raise _rewritten(whole[:done])
            segments.append(Segment(whole[done:start], train=False))
            segments.append(Segment(trainable, train=True))
            done = start + len(trainable)
        rest = whole[done:]
        return [*segments, Segment(rest, train=False)] if rest else segments

    def _answer(self, turns: Sequence[Turn], whole: str) -> tuple[int, str]:
        """Where the answer of the last turn starts in the whole text, and its trainable text."""
        *earlier, turn = turns
        prompt = self._text(earlier, add_generation_prompt=True)
        answered = self._text(turns, add_generation_prompt=False)
        if whole.startswith(prompt) and answered.startswith(prompt):
            trainable = _trainable(turn, answered[len(prompt) :])
            if whole.startswith(trainable, len(prompt)):
                return len(prompt), trainable
        # An earlier answer that is written differently from the last one: search it from the
        # turn's own text on, after the prefix that the prompt and the whole text share.
        before = self._text(earlier, add_generation_prompt=False)
        common = os.path.commonprefix([prompt, whole])
        trainable = _trainable(turn, answered[max(answered.rfind(turn.text.strip()), 0) :])
        start = whole.rfind(trainable, len(before), len(common) + len(trainable))
        if start < 0 or not whole.startswith(before):
            raise _rewritten(prompt)
        return start, trainable

    def _text(self, turns: Sequence[Turn], add_generation_prompt: bool) -> str:
        """What the template writes, without the BOS token that is put in front of it."""
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        arguments: dict[str, Any] = {
            **self._special_tokens,
            "chat_template": self.jinja,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            rendered: Any = render_jinja_template([messages], **arguments)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise UnusableTemplate(
                f"The tokenizer's chat template refuses this conversation ({error})"
            ) from error
        # (texts, spans of {% generation %} blocks)
        return str(rendered[0][0]).removeprefix(self._bos)


def _trainable(turn: Turn, added: str) -> str:
    """The trainable part of the text that an answer adds to the conversation.

    White space after the token that ends the turn is not part of it.
    """
    core = added.rstrip()
    return added if core.endswith(turn.text.rstrip()) else core


def _rewritten(text: str) -> UnusableTemplate:
    return UnusableTemplate(
        "The tokenizer's chat template changes earlier text when a turn is added "
        f"({text[-40:]!r} is not kept)"
    )
