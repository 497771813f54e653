"""A MoE model that was read from a dense checkpoint starts with the dense model's loss."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.tiny_run import read_metrics

# The time limit counts the runs, which the first test of a session waits for.
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

# Equal experts under renormalised weights: rounding only (fp32, sums of some 100 terms).
TOLERANCE = 1e-5


def first_loss(output: Path) -> float:
    """The loss of the first step, which is taken before any weight changes."""
    return float(read_metrics(output)[0]["lm_loss"])


@pytest.mark.parametrize("variant", ["moiie", "vanilla", "modality", "moiie8"])
def test_variants(variant: str, single: Path) -> None:
    assert first_loss(single / variant) == pytest.approx(
        first_loss(single / "dense"), abs=TOLERANCE
    )


@pytest.mark.parametrize("layout", ["ep2", "pp2", "tp2", "tp2etp2", "tp2ep2"])
def test_layouts(layout: str, single: Path, pair: Path) -> None:
    assert first_loss(pair / layout) == pytest.approx(first_loss(single / "dense"), abs=TOLERANCE)


def test_the_dense_checkpoint_is_not_a_fresh_model(single: Path) -> None:
    """Models that all missed the checkpoint would agree with each other, too."""
    seed = read_metrics(single / "seed")
    assert abs(seed[0]["lm_loss"] - first_loss(single / "dense")) > 0.05


def test_other_variants_are_other_models(single: Path) -> None:
    """One step later they differ: each variant really has its own experts."""
    norms = [read_metrics(single / name)[0]["grad_norm"] for name in ("moiie", "vanilla", "moiie8")]
    assert len(set(norms)) == 3
