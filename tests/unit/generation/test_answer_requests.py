"""Files of prompts: what is read, answered, written, and continued after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moiie_megatron.data.records.record import Turn
from moiie_megatron.generation.answer_requests import answer_requests
from moiie_megatron.generation.generator import Generator
from moiie_megatron.generation.requests import read_requests
from moiie_megatron.generation.results_file import ResultsFile
from moiie_megatron.generation.sampling import Sampling
from tests.helpers.user_errors import user_error

DRAWN = Sampling(1.0, seed=2)
GOOD: list[dict[str, Any]] = [
    {"id": "plain", "prompt": "What is 1 plus 2?"},
    {"prompt": "Is there a six?", "image": "test/00000.png"},
    {"question_id": 7, "text": "<image>\nIs there a six?", "image": "test/00001.png"},
    {
        "id": "record",
        "images": ["test/00000.png", "test/00001.png"],
        "conversations": [
            {"from": "human", "value": "<image>\n<image>\nWhich?"},
            {"from": "gpt", "value": "not read"},
        ],
    },
]
BAD: list[Any] = [
    {"id": "missing", "prompt": "What?", "image": "test/none.png"},
    {"id": "long", "prompt": "7 " * 3000},
    {"id": "empty"},
    ["a list"],
    {"id": "placeholders", "prompt": "<image> <image>", "image": "test/00000.png"},
]


def lines_of(values: list[Any]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Good and bad records in turn, an empty line, and one that is not JSON."""
    path = tmp_path / "records.jsonl"
    path.write_text(
        lines_of([GOOD[0], BAD[0], GOOD[1], BAD[1], BAD[2]])
        + "\n{\n"
        + lines_of([GOOD[2], BAD[3], BAD[4], GOOD[3]])
    )
    return path


def answered(
    generator: Generator, digits: Path, records: Path, first: int = 0, batch_size: int = 4
) -> list[dict[str, Any]]:
    batches = answer_requests(
        generator,
        read_requests(records),
        digits / "images",
        first=first,
        batch_size=batch_size,
        max_new_tokens=3,
        sampling=DRAWN,
    )
    return [result for batch in batches for result in batch]


def test_formats(mixed: Path) -> None:
    requests = read_requests(mixed)
    names = ["plain", "missing", "2", "long", "empty", "6", "7", "8", "placeholders", "record"]
    assert [request.id for request in requests] == names
    good = {request.id: request for request in requests if not request.error}
    assert set(good) == {"plain", "missing", "2", "long", "7", "record"}
    assert good["2"].turns == (Turn("user", "<image>\nIs there a six?"),)
    assert good["record"].turns == (Turn("user", "<image>\n<image>\nWhich?"),)
    assert good["record"].images == ("test/00000.png", "test/00001.png")


def test_a_bad_record_costs_only_itself(generator: Generator, digits: Path, mixed: Path) -> None:
    results = answered(generator, digits, mixed)
    errors = {result["id"]: result["error"] for result in results if "error" in result}
    assert set(errors) == {"missing", "long", "empty", "6", "8", "placeholders"}
    assert "test/none.png" in errors["missing"]
    assert "max_position_embeddings" in errors["long"]
    assert errors["6"].startswith("not JSON") and errors["8"] == "not a JSON object"
    for result in results:
        if "error" not in result:
            assert result["new_tokens"] <= 3
            cut_off = result["new_tokens"] == 3
            assert result["finish_reason"] == ("length" if cut_off else "stop")
    # Neither the batches nor where the work goes on change what is drawn.
    assert answered(generator, digits, mixed, batch_size=1) == results
    assert answered(generator, digits, mixed, first=5) == results[5:]


def test_files_that_are_none(tmp_path: Path) -> None:
    with user_error("--records", tmp_path / "none", "cannot be read"):
        read_requests(tmp_path / "none")
    (tmp_path / "empty").write_text("\n")
    with user_error("--records", "is empty"):
        read_requests(tmp_path / "empty")


def test_results_appear_when_they_are_complete(tmp_path: Path) -> None:
    out = tmp_path / "sub" / "out.jsonl"
    results = [{"id": str(i), "answer": "a\u2028b"} for i in range(4)]
    file = ResultsFile(out, "one")
    assert file.count() == 0
    file.append(results[:3])
    assert not out.exists()
    beside = next(out.parent.iterdir())
    beside.write_bytes(beside.read_bytes()[:-5])  # killed while it wrote
    again = ResultsFile(out, "one")
    assert again.count() == 2
    again.append(results[2:])
    assert again.finish() == results
    assert list(out.parent.iterdir()) == [out]
    assert [json.loads(line) for line in out.read_bytes().splitlines()] == results
    with user_error("--out", out, "exists"):
        ResultsFile(out, "one")


def test_results_of_another_generation_are_kept(tmp_path: Path) -> None:
    ResultsFile(tmp_path / "out", "one").append([{"id": "0"}])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with user_error("other options", "delete it"):
        ResultsFile(tmp_path / "out", "two").count()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    with user_error("cannot be written"):
        ResultsFile(tmp_path / "out.progress" / "out", "one")
