"""Questions and answers about 2 x 2 grids of digits: the text alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

PLACES: Final = ("top left", "top right", "bottom left", "bottom right")
WORDS: Final = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
)  # fmt: skip
_SUMS: Final = {"top row": (0, 1), "bottom row": (2, 3)}
_CAPTION_REQUESTS: Final = (
    "Describe the picture.",
    "What is in the picture?",
    "Read the digits in the picture.",
)


@dataclass(frozen=True)
class Question:
    """One exchange; ``kind`` groups questions for evaluation."""

    kind: str
    question: str
    answer: str


Grid = tuple[int, ...]  # the four digits in the order of PLACES


def caption(grid: Grid, rng: random.Random) -> str:
    """``bottom left 0, top right 7, top left 3, bottom right 1``; every second in reading order.

    With reading order alone, the position in the text would reveal the place, and the model would
    not learn the words for places; with random orders alone, it learns the digits late.
    """
    order: Sequence[int] = range(len(PLACES))
    if rng.random() < 0.5:
        order = rng.sample(order, k=len(PLACES))
    return ", ".join(f"{PLACES[place]} {grid[place]}" for place in order)


def caption_request(rng: random.Random) -> str:
    """One of several ways to ask for a caption."""
    return rng.choice(_CAPTION_REQUESTS)


def which_digit(grid: Grid, rng: random.Random) -> Question:
    """``digit_at`` for a random place."""
    return digit_at(grid, rng.randrange(4))


def digit_at(grid: Grid, place: int) -> Question:
    """Asks for the digit at a place, an index of ``PLACES``."""
    return Question("which", f"Which digit is at the {PLACES[place]}?", str(grid[place]))


def is_digit(grid: Grid, rng: random.Random) -> Question:
    """Yes and no are equally likely: the answer is drawn first, then a digit that makes it true."""
    place, right = rng.randrange(4), rng.random() < 0.5
    digit = grid[place] if right else rng.choice([d for d in range(10) if d != grid[place]])
    question = f"Is the digit at the {PLACES[place]} a {WORDS[digit]}?"
    return Question("is", question, "yes" if right else "no")


def row_sum(grid: Grid, rng: random.Random) -> Question:
    """Asks for the sum of a random row."""
    row = rng.choice(sorted(_SUMS))
    total = sum(grid[place] for place in _SUMS[row])
    return Question("sum", f"What is the sum of the {row}?", str(total))


def about(grid: Grid, rng: random.Random) -> Question:
    """A question about the picture; sums are the rarest."""
    return rng.choices((which_digit, is_digit, row_sum), weights=(5, 4, 1))[0](grid, rng)


def arithmetic(rng: random.Random) -> Question:
    """Asks for a sum or difference of two digits, without a picture."""
    a, b = rng.randrange(10), rng.randrange(10)
    if rng.random() < 0.5:
        return Question("text", f"What is {a} plus {b}?", str(a + b))
    a, b = max(a, b), min(a, b)
    return Question("text", f"What is {a} minus {b}?", str(a - b))


def same_digit(place: int, same: bool) -> Question:
    """A question about two pictures; ``same`` is the true answer."""
    question = f"Is there the same digit at the {PLACES[place]} of both pictures?"
    return Question("two", question, "yes" if same else "no")


def described(rng: random.Random) -> Question:
    """A question about a grid given in words, for pretraining the language model."""
    grid = tuple(rng.randrange(10) for _ in PLACES)
    asked = about(grid, rng)
    return Question(asked.kind, f"{caption(grid, rng)}. {asked.question}", asked.answer)


def vocabulary() -> list[str]:
    """Sentences of every form with every word and digit, for training the tokenizer."""
    rng = random.Random(0)
    lines = [f"{a} {WORDS[a]}" for a in range(10)]
    lines += list(_CAPTION_REQUESTS)
    for _ in range(400):
        grid = tuple(rng.randrange(10) for _ in PLACES)
        lines.append(caption(grid, rng))
        exchanges = [
            which_digit(grid, rng),
            is_digit(grid, rng),
            row_sum(grid, rng),
            arithmetic(rng),
            same_digit(rng.randrange(4), rng.random() < 0.5),
            described(rng),
        ]
        lines += [text for e in exchanges for text in (e.question, e.answer)]
    return lines
