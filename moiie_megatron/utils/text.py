"""Comparison of texts."""

from __future__ import annotations


def same_answer(answer: str, expected: str) -> bool:
    """Whether two answers are equal, ignoring case and surrounding white space."""
    return answer.strip().casefold() == expected.strip().casefold()
