"""A run goes on only with the order of samples that it began with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moiie_megatron.checkpoint.save_load import Progress
from moiie_megatron.data.stream.order import Blend
from moiie_megatron.training.loop import _check_same_run, total_steps
from tests.unit.config.minimal import load_minimal

FOLDER = Path("runs/checkpoints/step_0000002")


def progress(sizes: tuple[int, ...], *weights: float) -> Progress:
    blend = Blend.weighted(sizes, weights)
    size = blend.epoch_size
    return Progress(2, 8, num_samples=size, seed=7, blend=blend.describe(), schedule="a")


def test_the_same_order_goes_on() -> None:
    saved = progress((40, 20), 1.0, 0.5)
    _check_same_run(saved, replace(saved, step=0, consumed_samples=0, skipped_samples=3), FOLDER)
    # 0.51 of 20 is 10 as well: the same samples.
    _check_same_run(saved, progress((40, 20), 1.0, 0.51), FOLDER)
    # Written before there were weights.
    _check_same_run(replace(saved, blend=""), saved, FOLDER)


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (progress((40, 20), 1.0, 1.0), "the number of samples per epoch was 50, now it is 60"),
        (
            progress((40, 20), 0.75, 1.0),
            "of samples per epoch, source by source, was 40 of 40, 10 of 20, now it is 30 of 40, "
            "20 of 20: restore it, or start a new run in another output folder",
        ),
        (progress((20, 40), 0.5, 1.0), "was 40 of 40, 10 of 20, now it is 10 of 20, 40 of 40"),
        (replace(progress((40, 20), 1.0, 0.5), seed=8), "train.seed was 7, now it is 8"),
        (replace(progress((40, 20), 1.0, 0.5), schedule="b"), "the schedule was a, now it is b"),
    ],
)
def test_another_order_is_refused(now: Progress, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{FOLDER} was saved when .*{message}"):
        _check_same_run(progress((40, 20), 1.0, 0.5), now, FOLDER)


def test_epochs_count_what_an_epoch_has(tmp_path: Path) -> None:
    config = load_minimal(tmp_path, ["train.steps=null", "train.epochs=2"])
    assert total_steps(config, Blend.weighted((40, 20), (1.0, 0.5)).epoch_size) == 25
