"""Exported chat templates against the text of training."""

from __future__ import annotations

import copy
from typing import Any

import jinja2
import pytest
from jinja2 import nodes
from transformers.utils.chat_template_utils import render_jinja_template

from moiie_megatron.data.encode.chat_jinja import name_in, own_template
from moiie_megatron.data.encode.encoder import IGNORE, encode, encode_prompt
from moiie_megatron.data.encode.marker_templates import bos_text
from moiie_megatron.data.encode.stop_ids import learned_end, stop_ids
from moiie_megatron.data.encode.templates import Template, load_template
from moiie_megatron.data.encode.tokenizers import Tokenizer
from moiie_megatron.data.records.record import Record, Turn
from moiie_megatron.layout.token_types import IMAGE
from moiie_megatron.utils.errors import UserError
from tests.unit.data.encode import chat_templates

OWN = {
    name.lower(): getattr(chat_templates, name)
    for name in (
        *("QWEN2", "QWEN3", "MISTRAL", "LLAMA3", "LLAMA32", "PHI3_FIRST"),
        *("CLOCK", "PARTS", "USER_PARTS"),
    )
}
CONVERSATIONS = {
    "text": [Turn("user", "hi")],
    "image": [Turn("user", "<image>\nWhat is it?")],
    "two images": [Turn("user", "<image>\n<image>\nWhich?"), Turn("assistant", " both ")],
    "rounds": [
        Turn("user", "<image>\n na\u00efve\n\n"),
        Turn("assistant", "yes"),
        Turn("user", "{{ why }} <image>\n"),
        Turn("assistant", "so "),
    ],
}


def with_template(tokenizer: Tokenizer, text: str) -> Tokenizer:
    changed = copy.copy(tokenizer)
    changed.chat_template = text
    return changed


def rendered(
    template: Template, tokenizer: Tokenizer, turns: list[Turn], as_parts: bool, prompt: bool
) -> str:
    """What transformers writes."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        content: Any = turn.text
        if as_parts:
            pieces = turn.text.split("<image>\n")
            content = [{"type": "text", "text": pieces[0]}]
            for piece in pieces[1:]:
                content += [{"type": "image", "url": "x"}, {"type": "text", "text": piece}]
        messages.append({"role": turn.role, "content": content})
    arguments: dict[str, Any] = dict(tokenizer.special_tokens)
    texts: Any = render_jinja_template(
        [messages], chat_template=template.jinja, add_generation_prompt=prompt, **arguments
    )
    return str(texts[0][0])


@pytest.mark.parametrize("as_parts", [False, True])
@pytest.mark.parametrize("name", ["plain", "llama3", "phi3", *OWN])
def test_transformers_writes_the_text_of_training(
    name: str, as_parts: bool, llama3: Tokenizer, phi3: Tokenizer
) -> None:
    tokenizer = phi3 if name in ("plain", "phi3") else llama3
    if name in OWN:
        tokenizer = with_template(tokenizer, OWN[name])
    template = load_template("tokenizer" if name in OWN else name, tokenizer)
    bos = bos_text(tokenizer)
    assert bos
    for turns in CONVERSATIONS.values():
        for prompt in (False, True):
            text = "".join(s.text for s in template.render(turns, add_generation_prompt=prompt))
            want = text if text.startswith(bos) else bos + text
            assert want.startswith(bos) and not want.startswith(bos + bos)
            assert rendered(template, tokenizer, turns, as_parts, prompt) == want


@pytest.mark.parametrize("name", ["plain", "llama3", "phi3", *OWN])
def test_vllm_sees_that_lists_of_parts_are_taken(
    name: str, llama3: Tokenizer, phi3: Tokenizer
) -> None:
    """By a loop over ``message.content``, or over filters of it; else it drops the pictures."""
    tokenizer = phi3 if name in ("plain", "phi3") else llama3
    if name in OWN:
        tokenizer = with_template(tokenizer, OWN[name])
    template = load_template("tokenizer" if name in OWN else name, tokenizer)
    loops = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template.jinja)

    def unfiltered(node: Any) -> Any:
        return unfiltered(node.node) if isinstance(node, nodes.Filter) else node

    assert any(
        isinstance(iterated := unfiltered(loop.iter), nodes.Getattr)
        and (iterated.node.name, iterated.attr) == ("message", "content")
        for loop in loops.find_all(nodes.For)
    )


def test_a_template_of_an_export_is_taken_back(llama3: Tokenizer) -> None:
    """Export and import as often as wanted: the same text."""
    for text in (*OWN.values(), "{# stage #}\n\n  {{ bos_token }}" + chat_templates.MISTRAL):
        first = load_template("tokenizer", with_template(llama3, text)).jinja
        assert (name_in(text), name_in(first)) == (None, "tokenizer")
        assert own_template(first) == own_template(text) == text
        assert load_template("tokenizer", with_template(llama3, first)).jinja == first
    assert name_in(load_template("llama3", llama3).jinja) == "llama3"


def test_another_image_token(llama3: Tokenizer) -> None:
    for name in ("plain", "llama3", "tokenizer"):
        template = load_template(name, llama3, "<|image|>")
        turns = [Turn("user", "<image>\nhi"), Turn("assistant", "x")]
        assert "<|image|>" in rendered(template, llama3, turns, as_parts=True, prompt=True)
        assert "<image>" in template.render(turns)[0].text


@pytest.mark.parametrize(
    ("name", "date"), [("llama32", "Today Date: 26 Jul 2024\n"), ("clock", "2024-07-26 00:00:00\n")]
)
def test_the_date_is_fixed(name: str, date: str, llama3: Tokenizer) -> None:
    """In training and in the export, whatever the day and however long a rendering takes."""
    tokenizer = with_template(llama3, OWN[name])
    template = load_template("tokenizer", tokenizer)
    turns = [*CONVERSATIONS["rounds"], Turn("assistant", "x")]
    assert date in template.render(turns)[0].text
    assert date in rendered(template, tokenizer, turns, as_parts=True, prompt=True)
    codes = "{{ strftime_now('%A %-d %B %Y, %H:%M; %y%m%d %j') }} "
    tokenizer = with_template(llama3, codes + chat_templates.MISTRAL)
    text = load_template("tokenizer", tokenizer).render(turns)[0].text
    assert text.startswith("Friday 26 July 2024, 00:00; 240726 208 ")


def test_a_system_turn_is_not_lost(llama3: Tokenizer) -> None:
    template = load_template("tokenizer", with_template(llama3, chat_templates.PHI3_FIRST))
    assert template.render([Turn("user", "hi"), Turn("assistant", "x")])[1].text == "x<|end|>"
    with pytest.raises(UserError, match="leaves the system turn out: use"):
        template.render([Turn("system", "be brief"), Turn("user", "hi"), Turn("assistant", "x")])


def test_a_template_without_an_end_teaches_none(llama3: Tokenizer) -> None:
    """A space behind the answer stands between words, too."""
    text = "{% for m in messages %}{{ m.role | upper }}: {{ m.content + ' ' }}{% endfor %}"
    text += "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    tokenizer = with_template(llama3, text)
    template = load_template("tokenizer", tokenizer)
    assert learned_end(tokenizer, template) is None
    assert stop_ids(tokenizer, template) == {tokenizer.eos_id}
    own = load_template("llama3", llama3)
    assert learned_end(llama3, own) == llama3.token_id("<|eot_id|>")


def test_other_parts_are_refused(llama3: Tokenizer) -> None:
    template = load_template("llama3", llama3)
    messages = [{"role": "user", "content": [{"type": "video", "url": "x"}]}]
    with pytest.raises(Exception, match="another type than text and image"):
        render_jinja_template([messages], chat_template=template.jinja)


def test_a_template_that_wants_parts_is_trained(llama3: Tokenizer) -> None:
    """All words and all images, and the answers as targets."""
    tokenizer = with_template(llama3, chat_templates.PARTS)
    template = load_template("tokenizer", tokenizer)
    turns = (*CONVERSATIONS["rounds"],)
    encoded = encode(Record("r", ("1.png", "2.png"), turns), tokenizer, template, 3, 999)
    assert int((encoded.token_types == IMAGE).sum()) == 2 * 3
    targets = encoded.labels[encoded.labels != IGNORE].tolist()
    assert tokenizer.decode(targets) == "yes<|eot_id|>so <|eot_id|>"
    words = tokenizer.decode(encoded.tokens[encoded.token_types != IMAGE].tolist())
    assert all(turn.text.replace("<image>", "") in words for turn in turns)
    prompt, _ = encode_prompt(turns[:3], tokenizer, template, 3)
    assert prompt.tolist() == encoded.tokens[: len(prompt)].tolist()
