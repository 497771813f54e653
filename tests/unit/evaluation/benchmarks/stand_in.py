"""Stands in for the Python of lmms-eval's environment: writes what lmms-eval would write."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from moiie_megatron.evaluation.benchmarks.data_sets import DataPlaces
from moiie_megatron.evaluation.benchmarks.environment import EvalEnvironment
from moiie_megatron.evaluation.benchmarks.run import Evaluation
from moiie_megatron.evaluation.benchmarks.target import ServerTarget

# Answers two requests and scores them; fails for the task vqav2_val.
_PROGRAM = """
import json, os, pathlib, sys
words = sys.argv[1:]
value = lambda name: words[words.index(name) + 1]
task, out = value("--tasks"), pathlib.Path(value("--output_path"))
print("moiie progress 0 2", flush=True)
answers = dict(p.split("=", 1) for p in value("--model_args").split(","))["answers"]
lines = [{"key": "a", "text": "yes", "error": ""}, {"key": "b", "text": "", "error": "no picture"}]
with open(answers, "a") as file:
    file.write("".join(json.dumps(line) + "\\n" for line in lines))
with open(pathlib.Path(answers).with_name("calls"), "a") as file:
    file.write(json.dumps([words, os.getcwd(), dict(os.environ)]) + "\\n")
print("moiie progress 2 2", flush=True)
if task == "vqav2_val":
    sys.exit("\\x1b[31mValueError: no such split\\x1b[0m")
(out / "tiny").mkdir(parents=True)
metrics = {"pope_f1_score,none": 0.5, "pope_accuracy,none": 0.75, "alias": task}
metrics |= {"exact_match,flexible": 0.25, "exact_match_stderr,flexible": 0.1}
metrics |= {"submission,none": None, "gpt_eval_score,none": 40.0}
if task.endswith("_test"):
    (out / "submissions").mkdir()
    (out / "submissions" / "answers.json").write_text("[]")
(out / "tiny" / "2026_results.json").write_text(json.dumps({"results": {task: metrics}}))
"""


def write_python(folder: Path, program: str = _PROGRAM) -> Path:
    """An executable that takes the place of a Python."""
    file = folder / "python"
    file.write_text(f"#!{sys.executable}\n{program}")
    file.chmod(0o755)
    return file


def evaluation(folder: Path, **changes: Any) -> Evaluation:
    """Of a model behind a server that is never asked."""
    return Evaluation(
        ServerTarget("http://127.0.0.1:9/v1", "tiny"),
        folder / "out",
        EvalEnvironment(write_python(folder), "0.7.3", ()),
        DataPlaces(folder, folder / "cache", offline=False),
        **changes,
    )


def calls(directory: Path) -> list[tuple[list[str], str, dict[str, str]]]:
    """Arguments, directory and environment of each process of a task."""
    path = directory / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
