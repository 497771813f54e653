"""A run goes on only with the samples, the schedule and the experts that it began with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moiie_megatron.checkpoint.progress import Progress
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.stream.order import Blend
from moiie_megatron.training.identity import check_same_run, run_identity
from moiie_megatron.training.resume import total_steps
from tests.helpers.user_errors import user_error
from tests.unit.config.minimal import load_minimal

CHECKPOINT = Path("runs/checkpoints/step_0000002")


def identity(
    folder: Path, *overrides: str, sizes: tuple[int, ...] = (40, 20), weights: Any = (1.0, 0.5)
) -> dict[str, Any]:
    config = load_minimal(folder, list(overrides))
    return run_identity(config, Blend.weighted(sizes, weights), steps=25, dp_size=2)


def test_the_same_run_goes_on(tmp_path: Path) -> None:
    saved = identity(tmp_path)
    check_same_run(saved, saved, CHECKPOINT)
    # 0.51 of 20 is 10 as well: the same samples.
    check_same_run(saved, identity(tmp_path, weights=(1.0, 0.51)), CHECKPOINT)
    # What is no part of it may change, the number of ranks as well.
    other = identity(tmp_path, "train.spike_factor=7.0", "data.num_workers=3")
    check_same_run(saved, other, CHECKPOINT)
    # Written before sources had weights.
    check_same_run({"seed": saved["seed"], "epoch_size": 50}, saved, CHECKPOINT)


@pytest.mark.parametrize(
    ("now", "parts"),
    [
        ({"overrides": ["train.seed=8"]}, ("train.seed is 8", 1234)),
        ({"weights": (1.0, 1.0)}, ("number of samples per epoch", 60, 50)),
        ({"weights": (0.75, 1.0)}, ("samples per epoch of data.sources[0]", 30, 40)),
        ({"sizes": (20, 40), "weights": (0.5, 1.0)}, ("samples in data.sources[0]", 20, 40)),
        ({"sizes": (50,), "weights": (1.0,)}, ("number of data.sources", 1, 2)),
        (
            {"overrides": ["stage.learning_rates.connector=1e-5"]},
            ("stage.learning_rates.connector", "1e-05"),
        ),
        (
            {"overrides": ["stage.learning_rates.vision=null"]},
            ("stage.learning_rates.vision is not set",),
        ),
        ({"overrides": ["optimizer.warmup_ratio=0.5"]}, ("optimizer.warmup_ratio", "0.5", "0.03")),
        ({"overrides": ["moe.num_text_experts=2"]}, ("moe.num_text_experts", 2, 1)),
        ({"overrides": ["moe.layers=all"]}, ("moe.layers",)),
        ({"overrides": ["moe.variant=modality"]}, ("moe.variant is modality", "moiie")),
    ],
)
def test_another_run_is_refused(
    now: dict[str, Any], parts: tuple[Any, ...], tmp_path: Path
) -> None:
    saved, overrides = identity(tmp_path), now.pop("overrides", [])
    with user_error(*parts, CHECKPOINT, "checkpoint.init_from"):
        check_same_run(saved, identity(tmp_path, *overrides, **now), CHECKPOINT)


def test_the_order_of_energon_depends_on_ranks_and_workers(tmp_path: Path) -> None:
    config = load_minimal(tmp_path)
    data = config.data.model_copy(update={"loader": "energon", "num_workers": 2})
    energon = config.model_copy(update={"data": data})
    blend = Blend.weighted((40,), (1.0,))

    def of(config: RunConfig, dp_size: int) -> dict[str, Any]:
        return run_identity(config, blend, 25, dp_size)

    with user_error("data.loader is energon", "plain"):
        check_same_run(of(config, 2), of(energon, 2), CHECKPOINT)
    with user_error("data-parallel ranks", 4, 2):
        check_same_run(of(energon, 2), of(energon, 4), CHECKPOINT)


def test_it_is_stored_as_values(tmp_path: Path) -> None:
    """JSON in and out, and through a checkpoint's state."""
    saved = identity(tmp_path)
    assert json.loads(json.dumps(saved)) == saved
    progress = Progress(2, 8, saved, skipped_samples=3, skipped_steps=1)
    assert Progress.from_state(progress.to_state()) == progress
    assert progress.updates == 1


def test_epochs_count_what_an_epoch_has(tmp_path: Path) -> None:
    config = load_minimal(tmp_path, ["train.steps=null", "train.epochs=2"])
    assert total_steps(config, Blend.weighted((40, 20), (1.0, 0.5)).epoch_size) == 25
