"""The page holds what the run left, and needs nothing from elsewhere."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from moiie_megatron.analysis.report import write_report
from moiie_megatron.analysis.validations import read_validations
from moiie_megatron.training.logging.evaluations import Evaluated, append_evaluated
from moiie_megatron.training.validation.result import GroupSums, Validation
from tests.helpers.user_errors import user_error
from tests.unit.config.minimal import MINIMAL
from tests.unit.routing_stats.routing_records import RECORDS


def make_run(
    folder: Path, *, routed: bool = True, rates: Mapping[str, float] | None = None
) -> Path:
    """The files of a run of three steps; ``rates`` are further fields of its metrics."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(MINIMAL)
    lines = [
        {"step": step, "lm_loss": 4.0 / step, "aux_vision": 2.1, "aux_text": 2.0, "lr_moe": 1e-3}
        | {
            "grad_norm": 1.5,
            "tokens_per_second": 1000.0,
            "seconds": 25.0,
            "skipped_samples": step - 1,
        }
        | dict(rates or {})
        for step in (1, 2, 3)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    routing = RECORDS if routed else []
    (folder / "routing.jsonl").write_text("".join(json.dumps(r) + "\n" for r in routing))
    checkpoint = folder / "checkpoints" / "step_0000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "run.yaml").write_text(MINIMAL)
    (checkpoint.parent / "latest").write_text("step_0000003\n")
    return folder


def make_scores(folder: Path) -> Path:
    """Two questions, one with an image that exists."""
    Image.new("RGB", (40, 20), "red").save(folder / "red.png")
    outcomes = [
        {"id": "1", "kind": "colour", "expected": "Red", "answer": "red", "blanked_answer": "blue"}
        | {"question": "<image>\nWhich colour is <b>this</b>?", "images": ["red.png"]},
        {"id": "2", "kind": "colour", "expected": "7", "answer": "", "blanked_answer": "7"}
        | {"question": "What is gone?", "images": ["gone.png"]},
    ]
    accuracy = {"questions": 2, "accuracy": 0.5, "blanked_accuracy": 0.25}
    scores = {**accuracy, "by_kind": {"colour": accuracy}, "images": str(folder)}
    file = folder / "scores.json"
    file.write_text(json.dumps({**scores, "outcomes": outcomes}))
    return file


def images(page: str) -> list[tuple[str, bytes]]:
    """Kind and bytes of every image in the page."""
    found = re.findall(r'<img [^>]*src="data:image/([a-z+]+);base64,([^"]+)"', page)
    assert len(found) == page.count("<img ")
    return [(kind, base64.b64decode(data)) for kind, data in found]


def test_everything_is_there(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "skipped_samples.jsonl").write_text(
        '{"file": "a.jsonl", "index": 3, "reason": "image <x> is gone"}\n'
    )
    (run / "skipped_steps.jsonl").write_text('{"step": 2, "lm_loss": 9.87654321}\n')
    (run / "loss_spikes.jsonl").write_text('{"step": 1, "lm_loss": 8.7654321}\n')
    page = write_report([run], run / "report.html", scores=make_scores(tmp_path)).read_text()
    for heading in ("overview", "loss", "speed", "routing", "answers", "problems", "checkpoints"):
        assert f'<h2 id="{heading}">' in page and f'href="#{heading}"' in page
    drawn = images(page)
    # Two figures of the steps, three of the routing, one image of a question.
    assert [kind for kind, _ in drawn] == ["svg+xml"] * 5 + ["png"]
    assert all(data.count(b"<path") > 10 for kind, data in drawn if kind == "svg+xml")
    # Configuration, first loss, median of the last losses, experts, problems, checkpoint.
    assert "language: {preset: tiny-llama}" in page
    assert "<b>4.000</b>" in page and "<b>2.000</b>" in page
    assert "moiie: 1 vision, 2 shared, 1 text, top-2, 2 layers" in page
    assert "image &lt;x&gt; is gone" in page and "9.8765" in page
    assert "Loss spikes" in page and "8.7654" in page
    assert "step_0000003" in page and "latest" in page
    # 15 rows in each of 2 layers over 5 steps; 7 of them to another rank, 100 bytes each.
    assert ">6<" in page and ">3<" in page
    # Question, answer, truth; text is text, whatever it holds.
    assert "Which colour is &lt;b&gt;this&lt;/b&gt;?" in page and "&lt;image&gt;" not in page
    assert page.count('class="answer correct"') == 1 and "(nothing)" in page
    assert "image gone.png does not exist" in page


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    page = write_report([run], tmp_path / "page.html").read_text()
    text = re.sub(r'"data:[^"]+"', '""', page)
    assert "http" not in text and "//" not in text and "@import" not in text
    assert 'id="evaluation"' not in page  # it has none
    assert not re.search(r"<(script|link|iframe)", text)
    assert '<meta name="viewport" content="width=device-width' in text


def test_a_dense_run_and_a_run_with_experts_on_one_page(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "first", routed=False), make_run(tmp_path / "second")]
    page = write_report(runs, tmp_path / "report.html").read_text()
    assert "<h1>first / second</h1>" in page and "of second" in page
    assert page.count("every value of the run") == 2
    alone = write_report(runs[:1], tmp_path / "alone.html").read_text()
    assert 'id="routing"' not in alone and 'id="answers"' not in alone
    # No routing, no problems.
    assert len(images(alone)) == 2 and "Steps with problems" not in alone


def test_rates_that_only_newer_logs_have(tmp_path: Path) -> None:
    rates = {"tflops_per_rank": 412.3, "mfu": 0.417, "data_wait_fraction": 0.012}
    runs = [make_run(tmp_path / "old"), make_run(tmp_path / "new", rates=rates)]
    page = write_report(runs, tmp_path / "report.html").read_text()
    for title, value in (
        ("TFLOP/s per rank", "412"),
        ("MFU", "41.7%"),
        ("waiting for data", "1.2%"),
    ):
        assert page.count(f"<b>{value}</b><span>{title}</span>") == page.count(f">{title}<") == 1


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name / "run") for name in ("a", "b")]
    page = write_report(runs, tmp_path / "report.html").read_text()
    assert "<h1>1. run / 2. run</h1>" in page


def test_many_problems_are_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    line = '{"file": "a", "index": 1, "reason": "r"}\n'
    (run / "skipped_samples.jsonl").write_text(line * 130)
    page = write_report([run], tmp_path / "report.html").read_text()
    assert "Skipped samples: 130" in page and "30 more in the file" in page
    assert page.count("<td>r</td>") == 100


def test_refusals(tmp_path: Path) -> None:
    run, out = make_run(tmp_path / "run"), tmp_path / "report.html"
    with user_error(tmp_path, "config.yaml"):
        write_report([tmp_path], out)
    with user_error("run"):
        write_report([], out)
    with user_error(tmp_path / "none.json"):
        write_report([run], out, scores=tmp_path / "none.json")
    (tmp_path / "other.json").write_text("{}")
    with user_error(tmp_path / "other.json", "tools/accuracy.py"):
        write_report([run], out, scores=tmp_path / "other.json")
    assert not out.exists()


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "file").touch()
    with user_error(tmp_path / "file"):
        write_report([run], tmp_path / "file" / "report.html")
    assert list(tmp_path.glob("*.writing")) == []


def test_evaluations_while_training(tmp_path: Path) -> None:
    """The last line of a step counts, and none of a step that the run has not come to."""
    without, run = make_run(tmp_path / "without"), make_run(tmp_path / "run")
    scores = [
        *((1, "digits", 0.2), (2, "digits", 0.9), (2, "digits", 0.7), (3, "digits", 0.6)),
        *((4, "digits", 1.0), (2, "MME", 1234.5)),
    ]
    for number, (step, name, value) in enumerate(scores):
        append_evaluated(run, Evaluated(step, name, "accuracy", value, 420, 3, 1.0, str(number)))
    page = write_report([without, run], tmp_path / "report.html").read_text()
    assert '<h2 id="evaluation">' in page and 'href="#evaluation"' in page
    assert len(images(page)) == 2 + 3 + 1
    row = re.search(r"<td>digits</td>.*", page)
    assert row is not None
    cells = re.findall(r">([^<]+)</td>", row[0])
    assert cells == ["digits", "accuracy", "60.0%", "3", "70.0%", "2", "420", "3"]
    assert "1234.5" in page


def test_validation_while_training(tmp_path: Path) -> None:
    without, run = make_run(tmp_path / "without"), make_run(tmp_path / "run")
    with (run / "validation.jsonl").open("w") as file:
        for step, loss in ((0, 40.0), (2, 20.0), (3, 30.0)):
            parts = {
                "vqa": [GroupSums(), GroupSums(loss, 2, 10, 50, 30), GroupSums()],
                "all": [GroupSums(2.0, 1, 4, 10, 0), GroupSums(), GroupSums()],
            }
            line = {"step": step, **Validation(parts).to_json()}
            file.write(json.dumps(line) + "\n")
    page = write_report([without, run], tmp_path / "report.html").read_text()
    assert '<h2 id="validation">' in page and 'href="#validation"' in page
    assert len(images(page)) == 2 + 3 + 1
    (row,) = re.findall(r"<td>all samples</td>.*", page)
    cells = re.findall(r">([^<]+)</td>", row)
    assert cells == ["all samples", "2.2857", "3", "1.5714", "2", "3", "14", "50%"]
    found = read_validations(run)
    assert found.curves[0] == {
        "step": 0, "all samples": 3.0, "vqa": 4.0, "all": 0.5, "text only": 0.5, "one image": 4.0,
    }  # fmt: skip
    assert [row["name"] for row in found.rows] == list(found.curves[0])[1:]
    alone = write_report([without], tmp_path / "alone.html").read_text()
    assert 'id="validation"' not in alone
