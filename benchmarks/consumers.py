"""The same held-out questions to a checkpoint and to its export, through all that reads the export.

    python benchmarks/consumers.py runs/demo/stage2 \
        --transformers .venv/transformers-5.19.0 .venv/transformers-5.24.0 \
        --vllm .venv/vllm/bin/python --json FILE

Each consumer runs in a process of its own: the checkpoint with Megatron-Core, the export with the
installed transformers, with every other one that is named (a directory that pip --target filled),
and with vLLM and the plugin of serving/ (a Python that has vLLM).  All answer greedily, in fp32.
"Equal" counts answers that are the checkpoint's, letter by letter.

The questions are test.jsonl beside the first source of the run, as tools/prepare_data.py writes
it; --records and --images name others.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moiie_megatron.checkpoint.directory import CONFIG_FILE, find_checkpoint
from moiie_megatron.cli.program import run_program
from moiie_megatron.config.load import load_saved_config
from moiie_megatron.evaluation.questions import Question, read_questions
from moiie_megatron.evaluation.score import same_answer
from moiie_megatron.utils.errors import UserError

ROOT: Final = Path(__file__).resolve().parents[1]
MEGATRON: Final = "Megatron checkpoint"


@dataclass(frozen=True)
class Answers:
    """What a consumer has answered.

    Attributes:
        name: Consumer and version.
        texts: By the id of the question.
        seconds: From the start of the process to its end.
    """

    name: str
    texts: Mapping[str, str]
    seconds: float


@dataclass(frozen=True)
class Material:
    """What is asked of whom."""

    checkpoint: Path
    export: Path
    records: Path
    images: Path
    count: int | None
    longest: int

    def ask(self, name: str, command: Sequence[str], path: Path | None, out: Path) -> Answers:
        """Run a consumer, which writes its answers to ``out``.

        Args:
            name: Of the consumer.
            command: Its program and the model.
            path: A directory whose packages it sees first.

        Raises:
            UserError: It failed.
        """
        options = ["--records", str(self.records), "--images", str(self.images)]
        options += ["--max-new-tokens", str(self.longest), "--answers", str(out)]
        if self.count is not None:
            options += ["--limit", str(self.count)]
        places = [str(place) for place in (path, ROOT) if place is not None]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(places), "HF_HUB_OFFLINE": "1"}
        print(f"{name} ...", file=sys.stderr, flush=True)
        start = time.monotonic()
        done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True)
        seconds = time.monotonic() - start
        if done.returncode:
            raise UserError(f"{name} failed: {(done.stderr or done.stdout).strip()[-500:]}")
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        texts = {line["question_id"]: line["text"].strip() for line in lines}
        return Answers(name, texts, seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="step_... directory, or output directory of a run")
    parser.add_argument("--transformers", nargs="*", default=[], metavar="DIR")
    parser.add_argument("--vllm", nargs="*", default=[], metavar="PYTHON")
    parser.add_argument("--records", metavar="FILE")
    parser.add_argument("--images", metavar="DIR")
    parser.add_argument("--questions", type=int, metavar="N", help="only the first N")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table here")
    options = parser.parse_args(arguments)
    if options.questions is not None and options.questions < 1:
        raise UserError(f"--questions is {options.questions}: use 1 or more.")
    for folder in options.transformers:
        if not (Path(folder) / "transformers").is_dir():
            raise UserError(
                f"--transformers is {folder}, which has no transformers: fill it with pip install "
                "--no-deps --target."
            )
    with tempfile.TemporaryDirectory() as folder:
        material = prepare(options, Path(folder) / "export")
        questions = read_questions(material.records)[: material.count]
        columns = list(consumers(material, options, Path(folder)))
    rows = table(questions, columns)
    print(markdown(rows))
    if options.json:
        options.json.write_text(json.dumps({"consumers": rows}, indent=2) + "\n")


def prepare(options: argparse.Namespace, export: Path) -> Material:
    """Find the questions, and export the checkpoint.

    Raises:
        UserError: They cannot be found, or it cannot be exported.
    """
    from moiie_megatron.convert.export import export_checkpoint

    checkpoint = find_checkpoint(options.checkpoint)
    sources = load_saved_config(checkpoint / CONFIG_FILE).data.sources
    records, images = options.records, options.images
    if records is None and sources:
        records = Path(sources[0].records).parent / "test.jsonl"
    if images is None and sources:
        images = sources[0].images
    if records is None or images is None or not Path(records).is_file():
        raise UserError(f"There are no questions at {records}: give --records and --images.")
    export_checkpoint(checkpoint, export)
    return Material(
        checkpoint,
        export,
        Path(records),
        Path(images),
        options.questions,
        options.max_new_tokens,
    )


def consumers(material: Material, options: argparse.Namespace, folder: Path) -> Any:
    """Ask one after the other."""
    accuracy = [sys.executable, str(ROOT / "tools" / "accuracy.py")]
    export = [*accuracy, str(material.export), "--device", "cpu"]
    checkpoint = [*accuracy, str(material.checkpoint), "train.device=cpu", "train.precision=fp32"]
    yield material.ask(MEGATRON, checkpoint, None, folder / "megatron.jsonl")
    for i, site in enumerate([None, *map(Path, options.transformers)]):
        name = f"transformers {version('transformers', site, sys.executable)}"
        yield material.ask(name, export, site, folder / f"transformers{i}.jsonl")
    for i, python in enumerate(options.vllm):
        name = f"vLLM {version('vllm', None, python)}"
        command = [python, str(ROOT / "benchmarks" / "vllm_answers.py"), str(material.export)]
        yield material.ask(name, command, ROOT / "serving", folder / f"vllm{i}.jsonl")


def version(package: str, site: Path | None, python: str) -> str:
    """The version of a package that a Python finds.

    Raises:
        UserError: It does not find the package.
    """
    code = f"import {package}; print({package}.__version__)"
    environment = os.environ | ({"PYTHONPATH": str(site)} if site else {})
    done = subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{python} cannot import {package}: {done.stderr.strip()[-300:]}")
    return done.stdout.strip().splitlines()[-1]


def table(questions: Sequence[Question], columns: Sequence[Answers]) -> list[dict[str, Any]]:
    """Accuracy of each consumer (0..1), and its answers that equal those of the first.

    Raises:
        UserError: A consumer has not answered every question.
    """
    first, rows = columns[0].texts, []
    for column in columns:
        missing = [question.id for question in questions if question.id not in column.texts]
        if missing:
            raise UserError(f"{column.name} has no answer to {missing[0]}: look at its output.")
        correct = sum(
            question.expected is not None
            and same_answer(column.texts[question.id], question.expected)
            for question in questions
        )
        rows.append(
            {
                "consumer": column.name,
                "questions": len(questions),
                "accuracy": correct / len(questions),
                "equal": sum(column.texts[q.id] == first[q.id] for q in questions),
                "seconds": round(column.seconds, 1),
            }
        )
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as text."""
    lines = [f"| consumer | accuracy | equal to {MEGATRON} | seconds |", "|---|---|---|---|"]
    lines += [
        f"| {row['consumer']} | {row['accuracy']:.2%} | {row['equal']} of {row['questions']} "
        f"| {row['seconds']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(main)
