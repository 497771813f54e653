"""What is made of the sums: means over tokens, never means of means."""

from __future__ import annotations

import json

import pytest

from moiie_megatron.data.stream.example import SkippedSample
from moiie_megatron.training.validation.result import GroupSums, Validation

# Two sources: one of text and of pictures, one of pictures alone.
MIXED = Validation(
    {
        "vqa": (GroupSums(), GroupSums(30.0, 3, 10, 100, 48), GroupSums(8.0, 1, 2, 60, 32)),
        "all": (GroupSums(2.0, 1, 4, 40, 0), GroupSums(), GroupSums()),
    },
    seconds=1.26,
    skipped=(SkippedSample("a.json", 3, "gone"),),
)


def test_means_are_over_tokens() -> None:
    line = MIXED.to_json()
    assert json.loads(json.dumps(line)) == line
    assert line["loss"] == 40.0 / 16 and (line["samples"], line["label_tokens"]) == (5, 16)
    assert line["image_fraction"] == pytest.approx(80 / 200)
    assert line["skipped_samples"] == 1 and line["seconds"] == 1.26
    sources = line["sources"]
    assert {name: one["loss"] for name, one in sources.items()} == {"vqa": 38 / 12, "all": 0.5}
    assert {name: list(one["image_counts"]) for name, one in sources.items()} == {
        "vqa": ["one_image", "several_images"],
        "all": ["text_only"],
    }
    assert sources["vqa"]["image_counts"]["several_images"] == {
        "loss": 4.0,
        "samples": 1,
        "label_tokens": 2,
        "image_fraction": pytest.approx(32 / 60),
    }
    losses = {name: one["loss"] for name, one in line["image_counts"].items()}
    assert losses == {"text_only": 0.5, "one_image": 3.0, "several_images": 4.0}


def test_what_the_operator_and_tensorboard_get() -> None:
    assert str(MIXED) == (
        "loss 2.5000 | vqa 3.1667 | all 0.5000 | text only 0.5000 | one image 3.0000 | "
        "several images 4.0000 (5 samples, 16 label tokens, 1 could not be read, 1.3 s)"
    )
    assert MIXED.scalars() == {
        "validation/loss": 2.5,
        "validation/source/vqa": pytest.approx(38 / 12),
        "validation/source/all": 0.5,
        "validation/text_only": 0.5,
        "validation/one_image": 3.0,
        "validation/several_images": 4.0,
    }


def test_the_only_source_and_image_count_are_said_once() -> None:
    one = Validation({"vqa": (GroupSums(), GroupSums(3.0, 1, 2, 9, 4), GroupSums())}, seconds=0.5)
    assert str(one) == "loss 1.5000 (1 samples, 2 label tokens, 0.5 s)"
