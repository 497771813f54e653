"""Templates: the text of every format, and which of it is trained on, written out by hand."""

from __future__ import annotations

import copy

import pytest

from moiie_megatron.data.encode.templates import Segment, load_template
from moiie_megatron.data.encode.tokenizers import Tokenizer
from moiie_megatron.data.records.record import Turn
from tests.unit.data.encode.chat_templates import MISTRAL, QWEN2, QWEN3, THINK

TURNS = [
    Turn("user", "<image>\nhi "),
    Turn("assistant", "yes"),
    Turn("user", "why"),
    Turn("assistant", " so"),
]


def test_plain_keeps_image_and_last_caption(phi3: Tokenizer) -> None:
    template = load_template("plain", phi3)
    assert template.render(TURNS) == [Segment("<image>", False), Segment("so</s>", True)]
    two = [Turn("user", "a <image> b <image>"), Turn("assistant", "c")]
    assert template.render(two) == [Segment("<image><image>", False), Segment("c</s>", True)]
    assert template.render(TURNS[2:]) == [Segment("so</s>", True)]
    assert template.render(TURNS[:1], add_generation_prompt=True) == [Segment("<image>", False)]


def test_llama3(llama3: Tokenizer) -> None:
    template = load_template("llama3", llama3)
    user = "<|start_header_id|>user<|end_header_id|>\n\n"
    assistant = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert template.render(TURNS) == [
        Segment(f"<|begin_of_text|>{user}<image>\nhi<|eot_id|>{assistant}", False),
        Segment("yes<|eot_id|>", True),
        Segment(f"{user}why<|eot_id|>{assistant}", False),
        Segment("so<|eot_id|>", True),
    ]
    prompt = template.render([Turn("system", "be"), *TURNS[:1]], add_generation_prompt=True)
    system = "<|start_header_id|>system<|end_header_id|>\n\nbe<|eot_id|>"
    text = f"<|begin_of_text|>{system}{user}<image>\nhi<|eot_id|>{assistant}"
    assert prompt == [Segment(text, False)]


def test_phi3(phi3: Tokenizer) -> None:
    template = load_template("phi3", phi3)
    assert template.render(TURNS) == [
        Segment("<|user|>\n<image>\nhi <|end|>\n<|assistant|>\n", False),
        Segment("yes<|end|>", True),
        Segment("\n<|user|>\nwhy<|end|>\n<|assistant|>\n", False),
        Segment(" so<|end|>", True),
        Segment("\n", False),
    ]
    # The prompt of the second answer is exactly what stood before it in training.
    trained = template.render(TURNS)
    prompt = template.render(TURNS[:3], add_generation_prompt=True)
    assert prompt == trained[:3]


def with_template(tokenizer: Tokenizer, text: str | None) -> Tokenizer:
    changed = copy.copy(tokenizer)
    changed.chat_template = text
    return changed


def test_the_tokenizers_own_template(llama3: Tokenizer) -> None:
    template = load_template("tokenizer", llama3)
    head = "<|start_header_id|>{}<|end_header_id|>"
    assert template.render(TURNS) == [
        Segment(f"{head.format('user')}<image>\nhi <|eot_id|>\n{head.format('assistant')}", False),
        Segment("yes<|eot_id|>", True),  # not the line feed after it
        Segment(f"\n{head.format('user')}why<|eot_id|>\n{head.format('assistant')}", False),
        Segment(" so<|eot_id|>", True),
        Segment("\n", False),
    ]
    assert template.render(TURNS[:3], add_generation_prompt=True) == template.render(TURNS)[:3]


def test_a_line_feed_may_be_the_end_of_a_turn(llama3: Tokenizer) -> None:
    bare = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}"
    bare += "{% if add_generation_prompt %}assistant:{% endif %}"
    template = load_template("tokenizer", with_template(llama3, bare))
    assert template.render(TURNS[2:]) == [
        Segment("user:why\nassistant:", False),
        Segment(" so\n", True),
    ]


def test_llama3s_published_template_agrees(llama3: Tokenizer) -> None:
    published = (
        "{% for m in messages %}{% set c = '<|start_header_id|>' + m['role'] + "
        "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.first %}{% set c = bos_token + c %}{% endif %}{{ c }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
        "{% endif %}"
    )
    own = load_template("tokenizer", with_template(llama3, published))
    assert own.render(TURNS) == load_template("llama3", llama3).render(TURNS)


QWEN3_ALWAYS = QWEN3.replace("enable_thinking is defined and enable_thinking is false", "true")


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3-always", "mistral"])
def test_templates_of_families_without_an_own_one(family: str, llama3: Tokenizer) -> None:
    """As their tokenizers write conversations: both answers and their ends are trained on."""
    texts = {"qwen2": QWEN2, "qwen3": QWEN3, "qwen3-always": QWEN3_ALWAYS, "mistral": MISTRAL}
    text = texts[family]
    template = load_template("tokenizer", with_template(llama3, text))
    head, answer, rest = "<|im_start|>{}\n", "<|im_start|>assistant\n", [Segment("\n", False)]
    first = head.format("user") + "<image>\nhi <|im_end|>\n" + answer
    second = "\n" + head.format("user") + "why<|im_end|>\n" + answer
    answers = ["yes<|im_end|>", " so<|im_end|>"]
    if family == "qwen2":
        first = head.format("system") + "Help.<|im_end|>\n" + first
    elif family.startswith("qwen3"):
        second += THINK
    else:
        first, second, rest = "<|begin_of_text|>[INST] <image>\nhi [/INST]", "[INST] why[/INST]", []
        answers = [" yes<|eot_id|>", "  so<|eot_id|>"]
    assert template.render(TURNS) == [
        Segment(first, False),
        Segment(answers[0], True),
        Segment(second, False),
        Segment(answers[1], True),
        *rest,
    ]
    # What generation begins with is what stood in front of the last answer in training.
    prompt = template.render(TURNS[:3], add_generation_prompt=True)
    assert "".join(s.text for s in prompt) == "".join(s.text for s in template.render(TURNS)[:3])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "changes"),
        ("{{ raise_exception('no') }}", "refuses"),
        (None, "no chat template"),
    ],
)
def test_templates_that_cannot_be_used(llama3: Tokenizer, text: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_template("tokenizer", with_template(llama3, text))


def test_a_template_needs_its_markers(llama3: Tokenizer, phi3: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"phi3 but the tokenizer has no <\|user\|>"):
        load_template("phi3", llama3)
    with pytest.raises(ValueError, match=r"llama3 but the tokenizer has no <\|begin_of_text"):
        load_template("llama3", phi3)
    with pytest.raises(ValueError, match="stage.template is vicuna"):
        load_template("vicuna", phi3)
