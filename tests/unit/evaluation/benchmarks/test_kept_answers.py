from __future__ import annotations

from pathlib import Path

from moiie_megatron.evaluation.benchmarks.plugin.kept_answers import (
    Answer,
    KeptAnswers,
    read_answers,
    request_key,
)


def test_answers_are_there_again_and_failures_are_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    kept = KeptAnswers(path)
    kept.add({"a": Answer("yes\n\u00e9"), "b": Answer("", "no picture")})
    with path.open("a") as file:
        file.write('{"key": "c", "te')  # killed
    again = KeptAnswers(path)
    assert (again.get("a"), again.get("b"), again.get("c")) == (Answer("yes\n\u00e9"), None, None)
    again.add({"b": Answer("no")})
    assert read_answers(path) == {"a": Answer("yes\n\u00e9"), "b": Answer("no")}


def test_without_a_file_nothing_is_written(tmp_path: Path) -> None:
    kept = KeptAnswers(None)
    kept.add({"a": Answer("yes")})
    assert kept.get("a") == Answer("yes")
    assert list(tmp_path.iterdir()) == []


def test_keys_tell_requests_apart() -> None:
    parts, settings = ("pope", "test", 3, 0, "Is it?"), {"temperature": 0}
    key = request_key(parts, settings)
    assert key == request_key(parts, dict(settings))
    others = [
        request_key((*parts[:2], 4, *parts[3:]), settings),
        request_key((*parts[:4], "Is it not?"), settings),
        request_key(parts, {"temperature": 1}),
        request_key((*parts[:4], "\ud800"), settings),
    ]
    assert len({key, *others}) == 5
