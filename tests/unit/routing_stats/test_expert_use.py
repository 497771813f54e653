"""Totals over routing records, as counts over counts."""

from __future__ import annotations

import numpy as np

from moiie_megatron.routing_stats.expert_use import ExpertUse
from moiie_megatron.routing_stats.reading import newest
from tests.helpers.user_errors import user_error
from tests.unit.routing_stats.routing_records import RECORDS, record

USE = ExpertUse.from_records(newest(RECORDS, 15))


def test_fractions_add_up_counts() -> None:
    assert USE.layers == [3, 11] and USE.present() == ["vision", "text"]
    np.testing.assert_allclose(USE.fractions["vision"][11], [0.4, 1.0, 0.6, 0.0])
    np.testing.assert_allclose(USE.fractions["text"][3], [0.0, 0.5, 0.5, 1.0])


def test_layers_sort_as_numbers() -> None:
    use = ExpertUse.from_records([record(1, [20, 0, 0, 0], [0, 20, 0, 0], layers=(11, 3))])
    assert use.layers == [3, 11]


def test_a_modality_without_tokens() -> None:
    use = ExpertUse.from_records([record(10, [0] * 4, [0, 5, 5, 10])])
    assert use.present() == ["text"]


def test_records_of_older_programs() -> None:
    """They say ``share`` where today's say ``fraction``."""
    old = record(10, [10, 10, 0, 0], [0, 5, 5, 10])
    for layer in old["layers"].values():
        for modality in ("vision", "text"):
            layer[modality]["share"] = layer[modality].pop("fraction")
    np.testing.assert_allclose(ExpertUse.from_records([old]).fractions["vision"][3], [1, 1, 0, 0])


def test_refusals() -> None:
    with user_error("no routing records"):
        ExpertUse.from_records([])
    with user_error("different experts or layers"):
        ExpertUse.from_records([*RECORDS, record(30, [6, 10, 4, 0], [0, 5, 5, 10], layers=(1,))])
