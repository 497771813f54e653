"""The process beside a run may fail, hang or be slow: the run goes on."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from moiie_megatron.cli.watch import step_aside
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.training import evaluation_process as module
from moiie_megatron.training.evaluation_process import evaluation_process
from moiie_megatron.training.stop import StopRequest
from tests.helpers.launch import is_running
from tests.helpers.ranks import wait_until
from tests.unit.config.minimal import load_minimal

ON = (
    "checkpoint.interval=10",
    "evaluation.interval=10",
    "evaluation.sets=[{name: a, records: r.json, images: i}]",
)
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "


def config(folder: Path, *overrides: str) -> Any:
    (folder / "run").mkdir(exist_ok=True)
    return load_minimal(folder, [f"output={folder / 'run'}", *overrides])


def instead(monkeypatch: pytest.MonkeyPatch, code: str) -> list[Sequence[str]]:
    """Start this code instead of the program; returns the commands that were to be started."""
    commands: list[Sequence[str]] = []
    real = module.start_child

    def start(command: Sequence[str], **options: Any) -> Any:
        commands.append(command)
        return real([command[0], "-c", code], **options)

    monkeypatch.setattr(module, "start_child", start)
    return commands


def test_it_is_started_only_where_it_is_wanted(
    context: ParallelContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os; print(sorted(k for k in os.environ if k in ('RANK', 'MASTER_ADDR')),"
    code += " os.environ['OMP_NUM_THREADS'], repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    commands = instead(monkeypatch, code)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    for words in ((), (*ON, "evaluation.process=false")):
        with evaluation_process(config(tmp_path, *words), context) as process:
            process.wait(StopRequest())
            process.check()
    assert commands == [] and not (tmp_path / "run" / "evaluation.log").exists()
    with evaluation_process(config(tmp_path, *ON, "evaluation.threads=3"), context) as process:
        process.wait(StopRequest())
    assert (tmp_path / "run" / "evaluation.log").read_text() == "[] 3 ''\n"
    ((*_, priority, output, device),) = commands
    assert (priority, output) == ("--low-priority", str(tmp_path / "run"))
    assert device == "evaluation.device=cpu"


def test_one_that_fails(
    context: ParallelContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    instead(monkeypatch, "print('error: no pictures.'); raise SystemExit(7)")
    caplog.set_level(logging.WARNING)
    with evaluation_process(config(tmp_path, *ON), context) as process:
        process.wait(StopRequest())
        process.check()
    assert len(caplog.records) == 1
    assert "code 7 (error: no pictures)" in caplog.text and "evaluation.log" in caplog.text


@pytest.mark.parametrize("why", ["late", "stopped", "never"])
def test_one_that_hangs(
    why: str,
    context: ParallelContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It does not even heed SIGTERM."""
    monkeypatch.setattr(module, "_ENDING", 0.1)
    instead(monkeypatch, f"import os; print(os.getpid(), flush=True); {DEAF}time.sleep(600)")
    minutes = {"late": 0.005, "stopped": 10, "never": 0}[why]
    stop = StopRequest()
    if why == "stopped":
        stop.fail("A log is lost.")
    log = tmp_path / "run" / "evaluation.log"
    words = (*ON, f"evaluation.wait_minutes={minutes}")
    with evaluation_process(config(tmp_path, *words), context) as process:
        wait_until(lambda: log.read_text().endswith("\n"), log.read_text)
        begin = time.monotonic()
        with caplog.at_level(logging.WARNING):
            process.wait(stop)
        assert time.monotonic() - begin < 5
    assert not is_running(int(log.read_text()))
    assert ("--watch" in caplog.text) == (why != "never")


def test_the_lowest_priority() -> None:
    """In a process of its own: nobody gets a priority back."""
    pid = os.fork()
    if not pid:
        step_aside()
        score = Path("/proc/self/oom_score_adj").read_text().strip()
        os._exit(0 if (os.getpriority(os.PRIO_PROCESS, 0), score) == (19, "1000") else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
