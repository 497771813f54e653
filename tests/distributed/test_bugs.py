"""A bug keeps its traceback, on one rank; what a user can mend is one sentence (``UserError``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers import bugs
from tests.helpers.launch import TRAIN, command, run
from tests.helpers.ranks import start_ranks
from tests.helpers.tiny_run import read_metrics, tiny_values, write_config
from tests.helpers.user_errors import assert_user_error

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

BEGIN = "Traceback (most recent call last):"
MESSAGE = "ValueError: zip() argument 2 is shorter than argument 1"


def _config(folder: Path, digits: Path, **data: Any) -> Path:
    values = tiny_values(digits, folder / "run")
    values["data"] |= data
    return write_config(folder / "run.yaml", values)


def assert_traceback(text: str, *places: str) -> None:
    """One traceback that leads to the planted bug, through every place (file and function)."""
    lines = text.splitlines()
    assert sum(line == BEGIN for line in lines) == 1, text[-4000:]
    assert "error: " not in text
    assert text.rstrip().endswith(MESSAGE)
    source = Path(bugs.__file__).read_text().splitlines()
    number = 1 + next(i for i, line in enumerate(source) if "strict=True" in line)
    for place in (f'tests/helpers/bugs.py", line {number}, in _bug', *places):
        assert place in text, text[-4000:]


def test_in_a_step(tmp_path: Path, digits: Path) -> None:
    hook = f"{bugs.__name__}:in_a_step"
    words = command(TRAIN, [_config(tmp_path, digits)], hook=hook)
    finished = run(words, timeout=100)
    assert finished.code == 1
    assert_traceback(finished.stderr, ", in train_step", "moiie_megatron/training/step.py")
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1]


@pytest.mark.parametrize("only_rank", ["1", ""], ids=["rank_1", "all"])
def test_in_a_step_of_two_processes(only_rank: str, tmp_path: Path, digits: Path) -> None:
    """Rank 0 meets only the connection that rank 1 has left, and says nothing."""
    hook = f"{bugs.__name__}:in_a_step,{only_rank}"
    job = start_ranks(tmp_path, [_config(tmp_path, digits)], 2, hook)
    assert job.wait(100) == [1, 1]
    assert_traceback(job.text().partition(BEGIN)[1] + job.text().partition(BEGIN)[2])
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1]


@pytest.mark.parametrize("workers", [0, 1])
def test_in_the_data(workers: int, tmp_path: Path, digits: Path) -> None:
    """With its own traceback also where a worker process has met it."""
    config = _config(tmp_path, digits, num_workers=workers)
    finished = run(command(TRAIN, [config], hook=f"{bugs.__name__}:in_the_data"), timeout=100)
    assert finished.code == 1
    assert_traceback(
        finished.stderr,
        "moiie_megatron/data/stream/skipped_samples.py",
        ", in read_sample",
        "moiie_megatron/data/stream/loader.py",
        *(["DataLoader worker process 0", f"Original {BEGIN}"] if workers else []),
    )


def test_in_a_data_worker_of_two_processes(tmp_path: Path, digits: Path) -> None:
    config = _config(tmp_path, digits, num_workers=1)
    job = start_ranks(tmp_path, [config], 2, f"{bugs.__name__}:in_the_data,1")
    assert job.wait(100) == [1, 1]
    assert_traceback(job.text()[job.text().index(BEGIN) :], ", in read_sample")


def test_a_mistake_that_a_data_worker_meets(tmp_path: Path, digits: Path) -> None:
    """Too many records in a row are bad: one sentence, as from the process itself."""
    empty = tmp_path / "images"
    empty.mkdir()
    records = digits / "data" / "train.jsonl"
    config = _config(
        tmp_path,
        digits,
        num_workers=1,
        sources=[{"records": str(records), "images": str(empty)}],
        max_skipped_fraction=0.1,
    )
    finished = run(command(TRAIN, [config]), timeout=100)
    assert_user_error(finished, records, "does not exist", "Stopping")
