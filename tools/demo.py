"""Run the whole recipe on two CPU cores, from data to held-out accuracy, in minutes.

It writes images of handwritten digits and trains three runs (examples/configs/digits-*.yaml): a
dense model in place of pretrained backbones, stage 1 with a new connector, stage 2 with experts on
two processes.  Then it evaluates on images of unseen digits, and on the same images blanked.
Started again, it continues where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moiie_megatron.cli.program import run_program
from moiie_megatron.mcore.process_lifetime import start_child, stop_launcher
from moiie_megatron.utils.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("dense", "stage1", "stage2")
PROCESSES = 2
TRAIN_IMAGES, TEST_IMAGES = 6000, 100
REPORT_EVERY = 25  # steps
SAVE_SECONDS = 60
PLOTS = ("losses.png", "pathways.png", "groups.png", "load_map.png")


@dataclass(frozen=True)
class Plan:
    """Output directory and size of the demo."""

    out: Path
    quick: bool

    @property
    def data(self) -> Path:
        return self.out / "data"

    def config(self, stage: str) -> Path:
        return ROOT / "examples" / "configs" / f"digits-{stage}.yaml"

    def overrides(self, stage: str) -> list[str]:
        """Paths of this run, which the files in examples/configs expect in runs/demo."""
        records = "train.jsonl" if stage == "stage2" else "captions.json"
        sources = [{"records": str(self.data / records), "images": str(self.data / "images")}]
        result = [
            f"output={json.dumps(str(self.out / stage))}",
            f"data.sources={json.dumps(sources)}",
            f"data.tokenizer={json.dumps(str(self.data / 'tokenizer.model'))}",
        ]
        before = STAGES.index(stage) - 1
        if before >= 0:
            result.append(f"checkpoint.init_from={json.dumps(str(self.out / STAGES[before]))}")
        if self.quick:
            result += ["train.steps=4", "train.global_batch_size=8", "train.micro_batch_size=4"]
        return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="runs/demo", help="output directory (runs/demo)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few steps of each stage: tests that it runs, not that it learns",
    )
    arguments = parser.parse_args()
    return run(Plan(Path(arguments.out).absolute(), arguments.quick))


def run(plan: Plan) -> int:
    """Run all parts in sequence; return the exit code of the first that fails, or 0."""
    started = time.monotonic()
    write_data(plan)
    heading("Training: dense, then stage 1 (connector), then stage 2 (experts on 2 processes)")
    if code := train(plan):
        return code
    heading("Evaluation on images of unseen digits, and with the images blanked")
    if code := evaluate(plan):
        return code
    metrics = collect_metrics(plan)
    plot(plan, metrics)
    report = make_report(plan, metrics, time.monotonic() - started)
    write_text(plan.out / "report.json", json.dumps(report, indent=1) + "\n")
    write_page(plan)
    heading(
        f"Accuracy {report['accuracy']:.1%}, with blanked images "
        f"{report['blanked_accuracy']:.1%}, after {report['seconds']:.0f} s"
    )
    print(f"report      {plan.out / 'report.html'} {plan.out / 'report.json'}")
    print(f"plots       {' '.join(str(plan.out / name) for name in PLOTS)}")
    print(f"checkpoint  {report['checkpoint']}", flush=True)
    return 0


def write_data(plan: Plan) -> None:
    from moiie_megatron.data.digits.dataset import write_digits

    train, test = (64, 4) if plan.quick else (TRAIN_IMAGES, TEST_IMAGES)
    heading(f"Data: {train} training and {test} test images in {plan.data}")
    write_digits(plan.data, train=train, test=test)


def train(plan: Plan) -> int:
    """Train all stages in one job, so that Megatron is imported only once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--local-addr=localhost"]  # the host name of a container may not resolve
    command += [f"--nproc-per-node={PROCESSES}", str(ROOT / "tools" / "train.py")]
    for stage in STAGES:
        command += [str(plan.config(stage)), *plan.overrides(stage)]
    return follow(command, threads=1)


def evaluate(plan: Plan) -> int:
    command = [sys.executable, str(ROOT / "tools" / "accuracy.py"), str(plan.out / "stage2")]
    command += ["--records", str(plan.data / "test.jsonl")]
    command += ["--images", str(plan.data / "images")]
    command += ["--out", str(plan.out / "scores.json"), "--max-new-tokens", "8"]
    return follow(command, threads=PROCESSES)


def follow(command: Sequence[str], threads: int) -> int:
    """Run a program and print its output, with every 25th of its step lines."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    process = start_child(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            step = re.match(r"step (\d+)/(\d+) ", line)
            if step is None or step[1] in ("1", step[2]) or int(step[1]) % REPORT_EVERY == 0:
                print(line, end="", flush=True)
        process.wait()
    except BaseException:
        stop_launcher(process, signal.SIGTERM, SAVE_SECONDS)  # training saves
        raise
    if process.returncode:
        print(f"error: {' '.join(command[:7])} ... failed.", file=sys.stderr, flush=True)
    return process.returncode


def collect_metrics(plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """The metrics of each stage; one file with all of them is written too."""
    from moiie_megatron.analysis.records import read_metrics

    metrics = {stage: read_metrics(plan.out / stage / "metrics.jsonl") for stage in STAGES}
    lines = [
        json.dumps({"stage": stage, **record})
        for stage, records in metrics.items()
        for record in records
    ]
    write_text(plan.out / "metrics.jsonl", "\n".join(lines) + "\n")
    return metrics


def plot(plan: Plan, metrics: Mapping[str, list[dict[str, Any]]]) -> None:
    from moiie_megatron.analysis.curves import plot_curves
    from moiie_megatron.analysis.routing.plots import plot_routing
    from moiie_megatron.routing_stats.reading import read_routing

    plot_curves(metrics, plan.out / "losses.png")
    plot_routing(read_routing(plan.out / "stage2" / "routing.jsonl"), plan.out)


def make_report(
    plan: Plan, metrics: Mapping[str, list[dict[str, Any]]], seconds: float
) -> dict[str, Any]:
    scores = json.loads((plan.out / "scores.json").read_text())
    stages = {
        stage: {
            "steps": records[-1]["step"],
            "first_loss": records[0]["lm_loss"],
            "last_loss": records[-1]["lm_loss"],
            "seconds": sum(record["seconds"] for record in records),
        }
        for stage, records in metrics.items()
    }
    return {
        **{key: scores[key] for key in ("questions", "accuracy", "blanked_accuracy", "by_kind")},
        "stages": stages,
        "seconds": seconds,
        "checkpoint": scores["checkpoint"],
    }


def write_page(plan: Plan) -> None:
    from moiie_megatron.analysis.report import write_report

    runs = [plan.out / stage for stage in STAGES]
    write_report(runs, plan.out / "report.html", scores=plan.out / "scores.json")


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write_text(text)


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    run_program(main)
