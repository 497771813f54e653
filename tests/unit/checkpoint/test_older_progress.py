"""The sentences of format version 1, as its programs wrote them."""

from __future__ import annotations

from typing import Any

from moiie_megatron.checkpoint.older_progress import identity_from_sentences, renamed_counters
from moiie_megatron.checkpoint.progress import Progress
from tests.helpers.user_errors import user_error

OLD: dict[str, Any] = {
    "step": 6,
    "consumed_samples": 48,
    "num_samples": 50,
    "seed": 7,
    "blend": "40 of 40, 10 of 20",
    "schedule": (
        "6 steps (train.steps or train.epochs), learning rates vision 2e-06, moe 0.001, "
        "warmup_ratio 0.03, min_lr_ratio 0, weight_decay 0.1"
    ),
    "experts": "moiie with 1 vision, 2 shared and 1 text experts in layers [1, 3]",
    "bad_samples": 2,
    "skipped": 1,
}
SCHEDULE = {
    "steps": 6,
    "learning_rates": {"vision": 2e-6, "moe": 1e-3},
    "warmup_ratio": 0.03,
    "min_lr_ratio": 0.0,
    "weight_decay": 0.1,
}


def test_every_sentence() -> None:
    progress = Progress.from_state(OLD)
    assert (progress.step, progress.consumed_samples) == (6, 48)
    assert (progress.skipped_samples, progress.skipped_steps, progress.updates) == (2, 1, 5)
    assert progress.identity == {
        "seed": 7,
        "epoch_size": 50,
        "sources": [
            {"size": 40, "samples_per_epoch": 40},
            {"size": 20, "samples_per_epoch": 10},
        ],
        "loader": {"name": "plain"},
        "schedule": SCHEDULE,
        "experts": {"variant": "moiie", "vision": 1, "shared": 2, "text": 1, "layers": [1, 3]},
    }


def test_other_forms() -> None:
    energon = OLD | {"blend": "71 of 71 by energon on 2 data-parallel ranks x 3 workers"}
    loader = {"name": "energon", "dp_ranks": 2, "workers": 3}
    identity = identity_from_sentences(energon)
    assert identity["loader"] == loader
    assert identity["sources"] == [{"size": 71, "samples_per_epoch": 71}]
    earlier = OLD["schedule"].replace("(train.steps or train.epochs)", "with train.steps or epochs")
    assert identity_from_sentences(OLD | {"schedule": earlier})["schedule"] == SCHEDULE
    dense = identity_from_sentences(OLD | {"experts": "no experts"})
    assert dense["experts"] == {"variant": "dense"}


def test_what_the_first_programs_did_not_write() -> None:
    first = {key: OLD[key] for key in ("step", "consumed_samples", "num_samples", "seed")}
    progress = Progress.from_state(first)
    assert progress.identity == {"seed": 7, "epoch_size": 50}
    assert (progress.skipped_samples, progress.skipped_steps) == (0, 0)


def test_an_unknown_sentence() -> None:
    with user_error("a schedule of my own", "checkpoint.init_from"):
        identity_from_sentences(OLD | {"schedule": "a schedule of my own"})


def test_counters_have_their_present_names() -> None:
    old = {"watch": {"losses": [1.0], "bad_in_a_row": 2}}
    assert renamed_counters(old)["anomalies"] == {"losses": [1.0], "skipped_in_a_row": 2}
    new = {"anomalies": {"losses": [], "skipped_in_a_row": 0}}
    assert renamed_counters(new) == new
