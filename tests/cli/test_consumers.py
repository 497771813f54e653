"""The table of consumers; the consumers themselves have tests of their own."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.launch import ROOT
from tests.helpers.user_errors import user_error

IMAGE = "<image>\n"


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Three questions, about one picture, two, and none."""
    for name in ("a", "b"):
        Image.new("RGB", (2, 2)).save(tmp_path / f"{name}.png")
    images: list[Any] = ["a.png", ["a.png", "b.png"], None]
    texts = [f"{IMAGE}What?", f"See {IMAGE}and {IMAGE}Same?", "Hello"]
    lines = [
        {
            "id": f"q{i}",
            "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": str(i)}],
        }
        | ({"image": image} if image else {})
        for i, (image, text) in enumerate(zip(images, texts, strict=True))
    ]
    file = tmp_path / "test.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


@pytest.fixture
def program(records: Path) -> dict[str, Any]:
    """The names of ``benchmarks/consumers.py``, which exports nothing and asks nobody."""
    main = runpy.run_path(str(ROOT / "benchmarks" / "consumers.py"))["main"]
    names: dict[str, Any] = main.__globals__
    names["prepare"] = lambda options, export: names["Material"](
        records.parent, export, records, records.parent, options.questions, 32
    )
    return names


def test_the_table(program: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    given = {
        "first": {"q0": "0", "q1": "7", "q2": "2"},
        "second": {"q0": "0", "q1": "8", "q2": "2"},
    }
    program["consumers"] = lambda *_: [program["Answers"](n, t, 1.5) for n, t in given.items()]
    program["main"](["run", "--json", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text())["consumers"]
    assert [(row["consumer"], row["accuracy"], row["equal"]) for row in rows] == [
        ("first", 2 / 3, 3),
        ("second", 2 / 3, 2),
    ]
    assert "| second | 66.67% | 2 of 3 | 2 |" in capsys.readouterr().out
    program["main"](["run", "--questions", "1"])
    assert "| second | 100.00% | 1 of 1 | 2 |" in capsys.readouterr().out
    del given["second"]["q1"]
    with user_error("second has no answer to q1"):
        program["main"](["run"])


def test_what_is_refused(program: dict[str, Any], tmp_path: Path) -> None:
    with user_error("--transformers", tmp_path, "pip install --no-deps --target"):
        program["main"](["run", "--transformers", str(tmp_path)])
    with user_error("--questions is 0", "use 1 or more"):
        program["main"](["run", "--questions", "0"])


def test_a_consumer_that_fails(program: dict[str, Any], tmp_path: Path) -> None:
    material = program["Material"](tmp_path, tmp_path, tmp_path, tmp_path, 3, 32)
    with user_error("vLLM 1 failed: ", "out of memory"):
        material.ask("vLLM 1", ["sh", "-c", "echo out of memory >&2; exit 3"], None, tmp_path)


def test_messages_for_vllm(records: Path) -> None:
    conversation = runpy.run_path(str(ROOT / "benchmarks" / "vllm_answers.py"))["conversation"]
    found = [
        [part.get("text", "<picture>") for part in message["content"]]
        for line in records.read_text().splitlines()
        for message in conversation(json.loads(line), records.parent)
    ]
    assert found == [
        ["<picture>", "What?"],
        ["See ", "<picture>", "and ", "<picture>", "Same?"],
        ["Hello"],
    ]
