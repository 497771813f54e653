"""vLLM's greedy answers are those of transformers, token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine import apply_to_model, ask, compare, engine, read_rows

LOGPROB_TOLERANCE = 5e-5  # fp32; 1e-5 was measured
DEMO, RANDOM = 8, 16  # tokens of an answer, as in material.py

Note = Callable[[str, int, int, float], None]


def test_the_demo_answers_alike(material: Path, note: Note) -> None:
    """All at once, then once more, when prompts are in the prefix cache."""
    rows = read_rows(material / "demo")
    assert len(rows) == 50
    with engine(material / "demo") as llm:
        first, again = ask(llm, rows, DEMO), ask(llm, rows, DEMO)
    assert not any(answer["cached"] for answer in first)
    assert [answer["cached"] > 0 for answer in again] == [len(row["prompt"]) > 32 for row in rows]
    assert sum(answer["cached"] > 0 for answer in again) >= 20
    for what, answers in (("demo", first), ("demo, prompts from the prefix cache", again)):
        check(what, answers, rows, note)


def test_prompts_in_pieces_answer_alike(material: Path, note: Note) -> None:
    """Steps of 24 tokens cut through images, and hold pieces of several requests."""
    rows = read_rows(material / "demo")
    longest = max(len(row["prompt"]) for row in rows)
    assert longest > 3 * 24
    with engine(material / "demo", max_num_batched_tokens=24, max_num_seqs=8) as llm:
        first, again = ask(llm, rows, DEMO), ask(llm, rows, DEMO)
    check("demo, steps of 24 tokens", first, rows, note)
    check("demo, steps of 24 tokens, prefix cache", again, rows, note)


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("variant", ["dense", "vanilla", "modality", "moiie"])
def test_the_modality_chooses_the_router(
    material: Path, note: Note, family: str, variant: str
) -> None:
    """Random weights, whose answers depend on it; then the same with all tokens taken for text."""
    folder = material / f"{family}-{variant}"
    rows = read_rows(folder)
    with engine(folder, enable_prefix_caching=False) as llm:
        answers = ask(llm, rows, RANDOM)
        apply_to_model(llm, take_all_for_text)
        flipped = ask(llm, rows, RANDOM)
    check(f"random {family}, {variant}", answers, rows, note)
    check(f"random {family}, {variant}, all as text", flipped, rows, note, "as_text")
    changed = sum(one["tokens"] != two["tokens"] for one, two in zip(answers, flipped, strict=True))
    # 16 questions have pictures; dense and vanilla models have one path for all tokens.
    if variant in ("modality", "moiie"):
        assert changed >= 12
    else:
        assert changed == 0


def test_compiled_models_answer_alike(material: Path, note: Note) -> None:
    """torch.compile over steps of all sizes."""
    folder = material / "llama-moiie"
    rows = read_rows(folder)
    with engine(folder, enforce_eager=False) as llm:
        answers = ask(llm, rows, RANDOM)
    check("random llama, moiie, compiled", answers, rows, note)


def check(
    what: str,
    answers: list[dict[str, Any]],
    rows: list[dict[str, Any]],
    note: Note,
    key: str = "answer",
) -> None:
    equal, difference = compare(answers, rows, key)
    note(what, equal, len(rows), difference)
    assert equal == len(rows)
    assert difference < LOGPROB_TOLERANCE


def take_all_for_text(model: Any) -> None:
    embed = model.embed_input_ids

    def embed_as_text(*args: Any, **kwargs: Any) -> Any:
        embeds = embed(*args, **kwargs)
        model.is_image.zero_()
        return embeds

    model.embed_input_ids = embed_as_text
