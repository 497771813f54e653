"""The FLOPs of a step against a count by hand."""

from __future__ import annotations

import pytest

from moiie_megatron.planning.flops import Work, step_flops
from moiie_megatron.planning.parameters import count_parameters
from moiie_megatron.selftest.checks.models import tiny_config

CONFIG = tiny_config(1, "fp32")
HIDDEN, FFN, LAYERS, EXPERTS = 64, 128, 2, 4


def test_text() -> None:
    attention = HIDDEN * (HIDDEN + 2 * HIDDEN // 2 + HIDDEN)
    layer = attention + 2 * 3 * HIDDEN * FFN + 2 * 3 * HIDDEN  # two experts, two gates of three
    scores = 2 * (50 * 50 / 2 + 10 * 10 / 2) * HIDDEN
    by_hand = 6 * (60 * LAYERS * layer + 7 * HIDDEN * 512 + LAYERS * scores)
    assert step_flops(CONFIG, Work([50, 10], labels=7, images=0)) == pytest.approx(by_hand)


def test_images() -> None:
    count = count_parameters(CONFIG)
    more = step_flops(CONFIG, Work([50], 7, images=3)) - step_flops(CONFIG, Work([50], 7, 0))
    by_hand = 6 * (48 * (count.vision + count.connector) + 2 * LAYERS * 3 * 16 * 16 * HIDDEN)
    assert more == pytest.approx(by_hand)
