"""What may go wrong: interruptions, pictures, requests, data, judges.  Nothing ends the others."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from pathlib import Path

from tests.lmms_eval.programs import answers, command, evaluate, results
from tests.lmms_eval.scripted import judged, scripted
from tests.lmms_eval.stub_server import Messages, serving, text_of


def test_the_same_command_goes_on_after_a_kill(
    eval_python: str, variables: dict[str, str], sets: Path, tmp_path: Path
) -> None:
    fifth, kill = threading.Event(), threading.Event()
    asked: list[str] = []

    def answer(messages: Messages) -> str:
        asked.append(text_of(messages))
        if len(asked) == 5:
            fifth.set()
            kill.wait()
        return scripted(asked[-1])

    out = tmp_path / "out"
    with serving(answer) as server:
        words = (server.url, "--tasks", "MME,pope", "--data", sets, "--python", eval_python)
        words = (*words, "--batch-size", 1, "--out", out)
        first = subprocess.Popen(command(*words), env=variables, stdout=subprocess.DEVNULL)
        assert fifth.wait(300)
        first.send_signal(signal.SIGKILL)
        first.wait()
        kept = answers(out, "mme")
        kill.set()
        assert len(kept) == 4
        before = len(asked)
        text = evaluate(*words, variables=variables)
        assert len(asked) - before == 2 + 4  # the rest of MME, and POPE
        assert results(out)["MME"]["score"] == 125.0
        assert answers(out, "mme")[:4] == kept
        again = evaluate(*words, variables=variables)
        assert len(asked) - before == 2 + 4
        assert again.count("(from before)") == 2
        assert text.count("(from before)") == 0


def test_damaged_pictures_and_failing_requests_are_counted(
    eval_python: str, variables: dict[str, str], sets: Path, tmp_path: Path
) -> None:
    """The first row of the set and the third are damaged, the server refuses the fourth."""

    def answer(messages: Messages) -> str:
        if "dog" in text_of(messages):
            raise ValueError("no dogs here")
        return "no"

    with serving(answer) as server:
        words = (server.url, "--tasks", "pope", "--data", sets / "damaged", "--retries", 1)
        evaluate(*words, "--python", eval_python, "--out", tmp_path / "out", variables=variables)
    outcome = results(tmp_path / "out")["POPE"]
    assert (outcome["status"], outcome["requests"], outcome["errors"]) == ("scored", 4, 3)
    assert outcome["metrics"]["pope_accuracy"] == 0.0
    kept = answers(tmp_path / "out", "pope")
    assert [answer["text"] for answer in kept] == ["", "no", "", ""]
    assert kept[0]["error"].startswith("UnidentifiedImageError")
    assert "no dogs here" in kept[3]["error"]


def test_a_judge_can_come_later(
    eval_python: str, variables: dict[str, str], sets: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with (
        serving(lambda messages: scripted(text_of(messages))) as server,
        serving(lambda messages: judged(text_of(messages)), ("wise",)) as judge,
    ):
        words = (server.url, "--tasks", "mm-vet", "--data", sets, "--python", eval_python)
        words = (*words, "--out", out)
        text = evaluate(*words, variables=variables)
        assert "needs a judge (--judge-url)" in text
        assert results(out)["MM-Vet"]["status"] == "unscored"
        assert len(answers(out, "mmvet")) == len(server.requests) == 2
        judging = ("--judge-url", judge.url, "--judge-model", "wise")
        evaluate(*words, *judging, variables=variables)
        assert len(server.requests) == 2
        assert {request["model"] for request in judge.requests} == {"wise"}
    assert results(out)["MM-Vet"]["score"] == 50.0


def test_missing_data_are_named_before_the_start(
    eval_python: str, variables: dict[str, str], sets: Path, tmp_path: Path
) -> None:
    with serving(lambda messages: scripted(text_of(messages))) as server:
        words = (server.url, "--tasks", "ai2d,pope", "--python", eval_python)
        text = evaluate(
            *words, "--data", sets / "damaged", "--out", tmp_path / "a", variables=variables, code=1
        )
        assert "no data, lmms-lab-encoder/ai2d: not started (offline)" in text
        assert f"{sets / 'damaged'}/NAME, then the cache" in text
        assert {n: o["status"] for n, o in results(tmp_path / "a").items()} == {
            "AI2D": "no data",
            "POPE": "scored",
        }
        text = evaluate(
            *words, "--data", tmp_path, "--out", tmp_path / "b", variables=variables, code=1
        )
        assert "error: No benchmark has its data on this machine" in text
        assert not list((tmp_path / "b").glob("*/"))


def test_a_task_that_fails_does_not_end_the_others(
    eval_python: str, variables: dict[str, str], sets: Path, tmp_path: Path
) -> None:
    """A task of one's own, whose data file is not there."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path / 'none.jsonl'}\ntest_split: test\noutput_type: generate_until\n"
        "doc_to_text: question\ndoc_to_target: answer\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n"
    )
    with serving(lambda messages: scripted(text_of(messages))) as server:
        words = (server.url, "--tasks", "mine,docvqa", "--include", tasks, "--data", sets)
        words = (*words, "--python", eval_python, "--out", tmp_path / "out")
        evaluate(*words, variables=variables, code=1)
        found = results(tmp_path / "out")
        assert found["mine"]["status"] == "failed"
        assert "none.jsonl" in found["mine"]["reason"]
        assert found["DocVQA"]["score"] == 60.0
        rows = [{"question": "Is there a zero?", "answer": "Yes"}]
        (tmp_path / "none.jsonl").write_text("\n".join(map(json.dumps, rows)))
        evaluate(*words, variables=variables)
    assert results(tmp_path / "out")["mine"]["metrics"]["exact_match"] == 1.0
