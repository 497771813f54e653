"""Two processes with half of each layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from engine import ask, compare, engine, read_rows


def test_two_processes_answer_alike(material: Path, note: Callable[..., None]) -> None:
    """Phi-3's attention is one matrix for queries, keys and values, which has to be divided."""
    folder = material / "phi3-moiie"
    rows = read_rows(folder)
    with engine(folder, tensor_parallel_size=2) as llm:
        answers = ask(llm, rows, 16)
    equal, difference = compare(answers, rows)
    note("random phi3, moiie, two processes", equal, len(rows), difference)
    assert equal == len(rows)
    assert difference < 5e-5
