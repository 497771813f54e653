"""Routing assumptions: probabilities that add up, the worst skew, what a run did."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from moiie_megatron.layout.experts import ExpertLayout
from moiie_megatron.layout.placement import Placement, place_experts
from moiie_megatron.layout.token_types import MODALITIES
from moiie_megatron.planning.routing import RoutingAssumption, balanced, replayed, skewed
from tests.helpers.user_errors import user_error
from tests.unit.routing_stats.routing_records import LAYOUT, RECORDS, record

LAYOUTS = [
    ExpertLayout.from_variant("moiie"),
    ExpertLayout.from_variant("moiie", vision=2, shared=4, text=2),
    ExpertLayout.from_variant("vanilla"),
    ExpertLayout.from_variant("modality"),
    ExpertLayout.from_variant("moiie", vision=1, shared=6, text=1, top_k=3),
]


def rank_loads(routing: RoutingAssumption, placement: Placement, fraction: float) -> np.ndarray:
    """Expected experts per token of the batch on every expert-parallel rank."""
    vision, text = (np.array(routing.loads(1, modality)) for modality in MODALITIES)
    slots = (fraction * vision + (1 - fraction) * text)[list(placement.physical_to_logical)]
    return np.asarray(slots.reshape(placement.ep_size, -1).sum(axis=1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("factor", [1.0, 1.2, 3.0])
def test_loads_add_up(layout: ExpertLayout, factor: float) -> None:
    placement = place_experts("contiguous", layout, 2, 0.7, None)
    for routing in (balanced(layout), skewed(layout, factor, placement, 0.7)):
        for modality in MODALITIES:
            loads = np.array(routing.loads(5, modality))
            assert loads.sum() == pytest.approx(layout.top_k)
            assert loads.max() <= 1
            allowed = layout.allowed(modality)
            assert not any(loads[e] for e in range(layout.num_experts) if e not in allowed)
            if routing.origin == "balanced routing":
                assert np.ptp(loads[list(allowed)]) == 0
            else:
                assert loads.max() == pytest.approx(min(1, factor * layout.top_k / len(allowed)))


def test_the_skew_is_the_worst_of_all() -> None:
    """Vision experts 0 1, shared 2 to 5, text 6 7; the shared experts 2 3 are on rank 1."""
    layout = LAYOUTS[1]
    placement = place_experts("contiguous", layout, 4, 0.7, None)
    routing = skewed(layout, 2.0, placement, 0.7)
    assert int(np.argmax(routing.loads(1, "vision"))) == 2
    assert int(np.argmax(routing.loads(1, "text"))) == 2
    # 0.667 and 4/15 on rank 1 for either modality.
    np.testing.assert_allclose(rank_loads(routing, placement, 0.7)[1], 2 / 3 + 4 / 15)
    # Shared experts apart, most images: the rank of the vision experts, whatever text does.
    shared_apart = Placement((0, 1, 2, 6, 3, 7, 4, 5), 4, 1.0, False)
    routing = skewed(layout, 1.2, shared_apart, 0.95)
    assert int(np.argmax(routing.loads(1, "vision"))) in (0, 4)
    for fraction in (0.0, 0.3, 0.7, 1.0):
        worst = rank_loads(skewed(layout, 1.5, shared_apart, fraction), shared_apart, fraction)
        assert worst.max() == pytest.approx(brute_force(layout, 1.5, shared_apart, fraction))


def brute_force(layout: ExpertLayout, factor: float, placement: Placement, share: float) -> float:
    """The largest load of a rank over all pairs of preferred experts."""
    size = layout.num_experts // placement.ep_size

    def load(modality: str, preferred: int, expert: int) -> float:
        allowed = layout.allowed(modality)  # type: ignore[arg-type]
        most = min(1.0, factor * layout.top_k / len(allowed))
        if expert not in allowed:
            return 0.0
        return most if expert == preferred else (layout.top_k - most) / (len(allowed) - 1)

    return max(
        sum(
            share * load("vision", a, expert) + (1 - share) * load("text", b, expert)
            for expert in placement.physical_to_logical[rank * size : (rank + 1) * size]
        )
        for a in layout.allowed("vision")
        for b in layout.allowed("text")
        for rank in range(placement.ep_size)
    )


def test_a_dense_model_has_no_loads() -> None:
    assert balanced(ExpertLayout.from_variant("dense")).loads(1, "vision") == ()


@pytest.mark.parametrize("factor", [0.9, float("nan")])
def test_a_skew_below_one_is_refused(factor: float) -> None:
    placement = place_experts("contiguous", LAYOUT, 2, 0.7, None)
    with user_error("skew", f"{factor:g}"):
        skewed(LAYOUT, factor, placement, 0.5)


def write(path: Path, records: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def test_a_replay_has_the_loads_of_the_run(tmp_path: Path) -> None:
    routing = replayed(write(tmp_path / "routing.jsonl", RECORDS), LAYOUT, [3, 11], last=15)
    np.testing.assert_allclose(routing.loads(11, "vision"), [0.4, 1.0, 0.6, 0.0])
    np.testing.assert_allclose(routing.loads(3, "text"), [0.0, 0.5, 0.5, 1.0])
    assert routing.origin == "routing of routing.jsonl"
    with pytest.raises(KeyError):
        routing.loads(4, "text")


def test_a_replay_without_images_is_balanced_for_them(tmp_path: Path) -> None:
    file = write(tmp_path / "r.jsonl", [record(10, [0] * 4, [0, 5, 5, 10])])
    routing = replayed(file, LAYOUT, [3])
    assert routing.loads(3, "vision") == balanced(LAYOUT).loads(3, "vision")
    assert "vision tokens balanced" in routing.origin


def test_a_replay_of_another_model_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "r.jsonl", RECORDS)
    with user_error(file, "4 experts", "8", "vision.1"):
        replayed(file, LAYOUTS[1], [3])
    with user_error(file, "layer 5", "3, 11"):
        replayed(file, LAYOUT, [3, 5])
    with user_error(tmp_path / "none"):
        replayed(tmp_path / "none", LAYOUT, [3])


@pytest.mark.parametrize(
    ("vision", "problem"),
    [
        ([10, 10, 0, 0], None),
        ([8, 4, 0, 8], "may not use"),
        ([15, 5, 0, 0], "above 1"),
        ([5, 5, 5, 0], "add up to 1.5"),
    ],
)
def test_loads_that_no_router_can_have(
    tmp_path: Path, vision: list[int], problem: str | None
) -> None:
    file = write(tmp_path / "r.jsonl", [record(10, vision, [0, 5, 5, 10])])
    if problem is None:
        replayed(file, LAYOUT, [3])
        return
    with user_error(file, problem, "layer 3", "vision"):
        replayed(file, LAYOUT, [3])
