"""Expected rows of experts and ranks: against the dispatcher, and against known figures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moiie_megatron.layout.experts import ExpertLayout
from moiie_megatron.layout.placement import Placement, expected_loads, place_experts
from moiie_megatron.layout.token_types import MODALITIES
from moiie_megatron.moe.dispatcher import rows_by_rank
from moiie_megatron.planning.expert_load import (
    RoutedTokens,
    expert_load,
    group_tokens,
    load_range,
    rows_per_token,
)
from moiie_megatron.planning.routing import RoutingAssumption, balanced, skewed
from moiie_megatron.planning.samples.drawn_steps import DrawnSteps
from moiie_megatron.planning.top_k_choice import top_k_choice
from moiie_megatron.planning.workload import MicroBatchShape, SampleShape, Workload
from moiie_megatron.selftest.checks.models import tiny_config

E4 = ExpertLayout.from_variant("moiie")  # V S S L
E8 = ExpertLayout.from_variant("moiie", vision=2, shared=4, text=2)  # VV SSSS LL
DISPATCHERS = ("moiie", "flex", "alltoall", "allgather")


def placed(layout: ExpertLayout, ep_size: int, kind: str = "balanced") -> Placement:
    return place_experts(kind, layout, ep_size, 0.7, None)


def routings(layout: ExpertLayout, placement: Placement) -> list[RoutingAssumption]:
    return [balanced(layout), skewed(layout, 1.4, placement, 0.6)]


@pytest.mark.parametrize("ep_size", [1, 2, 4, 8])
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_rows_are_those_of_the_dispatcher(ep_size: int, dispatcher: str) -> None:
    """20,000 tokens of each modality, each with experts of its own."""
    tokens = 20_000
    placement = placed(E8, ep_size)
    slots = list(placement.physical_to_logical)
    for routing in routings(E8, placement):
        expected_MN = rows_per_token(routing, 1, placement, dispatcher)
        assert expected_MN.shape == (2, ep_size)
        for modality, expected_N in zip(MODALITIES, expected_MN, strict=True):
            choice = top_k_choice(routing.loads(1, modality))
            routing_map_TE = choice.sample(tokens, np.random.default_rng(3))
            rows_TN = rows_by_rank(torch.from_numpy(routing_map_TE[:, slots]), ep_size, dispatcher)
            found_N = rows_TN.double().mean(dim=0).numpy()
            np.testing.assert_allclose(found_N, expected_N, atol=5 * 0.8 / np.sqrt(tokens))


# Copies per token that go to another rank (alltoall, moiie) and load of the most loaded rank over
# the mean, at 0.5 and 0.8 of image tokens; from the definitions, by hand.
KNOWN = [
    (E4, 2, (0, 1, 2, 3), 1.00, 0.833, 1.00, 1.20),  # VS | SL
    (E4, 2, (0, 3, 1, 2), 1.00, 0.833, 1.33, 1.33),  # VL | SS
    (E4, 4, (0, 1, 2, 3), 1.50, 1.50, 1.33, 1.33),
    (E8, 2, (0, 1, 2, 3, 4, 5, 6, 7), 1.00, 0.767, 1.00, 1.20),  # VVSS | SSLL
    (E8, 2, (0, 2, 3, 6, 1, 4, 5, 7), 1.00, 0.800, 1.00, 1.00),  # VSSL | VSSL
    (E8, 4, (0, 1, 2, 3, 4, 5, 6, 7), 1.50, 1.35, 1.33, 1.33),  # VV | SS | SS | LL
    (E8, 4, (0, 2, 1, 3, 4, 6, 5, 7), 1.50, 1.40, 1.00, 1.20),  # VS | VS | SL | SL
    (E8, 8, (0, 1, 2, 3, 4, 5, 6, 7), 1.75, 1.75, 1.33, 1.33),
]


@pytest.mark.parametrize(
    ("layout", "ep_size", "slots", "alltoall", "moiie", "half", "most_images"), KNOWN
)
def test_known_placements(
    layout: ExpertLayout,
    ep_size: int,
    slots: tuple[int, ...],
    alltoall: float,
    moiie: float,
    half: float,
    most_images: float,
) -> None:
    placement = Placement(slots, ep_size, 1.0, False)
    for fraction, imbalance in ((0.5, half), (0.8, most_images)):
        tokens = [RoutedTokens(1000 * fraction, 1000 * (1 - fraction))] * ep_size
        for dispatcher, copies in (("alltoall", alltoall), ("moiie", moiie), ("flex", moiie)):
            load = expert_load(balanced(layout), 1, placement, tokens, dispatcher)
            assert load.sent_N.sum() / (1000 * ep_size) == pytest.approx(copies, abs=6e-4)
            assert load.max_over_mean == pytest.approx(imbalance, abs=0.004)
        everything = expert_load(balanced(layout), 1, placement, tokens, "allgather")
        np.testing.assert_array_equal(everything.received_N, 1000 * ep_size)


def test_experts_have_their_loads_in_physical_order() -> None:
    placement = placed(E8, 4)
    tokens = [RoutedTokens(300, 100), RoutedTokens(0, 400), RoutedTokens(400, 0)] * 2
    load = expert_load(balanced(E8), 1, placement, tokens[:4], "moiie")
    vision, text = 300 + 400 + 300, 100 + 400 + 100
    expected = (vision + text) * np.array(expected_loads(E8, vision / (vision + text)))
    slots = list(placement.physical_to_logical)
    np.testing.assert_allclose(load.experts_NL.ravel(), expected[slots])
    assert load.ranks_N.sum() == pytest.approx(2 * (vision + text))
    # The rank without text sends nothing to text experts alone.
    assert load.rows_NN[2].sum() == pytest.approx(400 * rows_per_token(
        balanced(E8), 1, placement, "moiie"
    )[0].sum())  # fmt: skip
    np.testing.assert_allclose(load.received_N, load.rows_NN.sum(axis=0))


def test_the_image_fraction_moves_the_load() -> None:
    """VS | SL: images load the first rank, text the second, and half of each none more."""
    placement = Placement((0, 1, 2, 3), 2, 1.0, False)
    fractions = [0.5] * 98 + [0.9, 0.0]
    groups = [RoutedTokens(100 * f, 100 * (1 - f)) for f in fractions]
    found = load_range(balanced(E4), 1, placement, groups)
    assert found.tokens == 100
    assert found.all_images == found.all_text == pytest.approx(100 * 4 / 3)
    # 2/3 of two experts, or of one, per token: 100 * (0.9 * 4 + 0.1 * 2) / 3.
    assert found.most == pytest.approx(100 * 4 / 3)
    assert found.quantile == pytest.approx(100 * 3.8 / 3)
    assert found.mean == pytest.approx((98 * 100 + 100 * 4 / 3 + 100 * 3.8 / 3) / 100)
    assert found.most_over_mean == pytest.approx(4 / 3)
    assert found.max_over_mean == pytest.approx(1, abs=0.01)
    even = load_range(balanced(E8), 1, placed(E8, 2), groups)
    assert even.all_images == even.all_text == even.most == pytest.approx(100)


def test_tokens_of_a_group() -> None:
    """4 image tokens an image; padding is routed like text."""
    config = tiny_config(1, "fp32")
    image_tokens = config.vision.num_image_tokens
    one = MicroBatchShape(((SampleShape(40, 1, 5),), (SampleShape(30, 0, 5),)), 48)
    other = MicroBatchShape(((SampleShape(48, 2, 5),),), 48)
    ranks = ((one, other), (other, one), (one, one), (other, other))
    for tensor, expert, expected in (
        (1, 4, [(6, 6 * 48), (6, 6 * 48)]),
        (1, 2, [(3, 144), (3, 144), (3, 144), (3, 144)]),
        (4, 2, [(n / 2, 48 * r / 2) for n, r in ((1, 2), (2, 1), (2, 1), (1, 2))]),
    ):
        parallel = config.parallel.model_copy(update={"tensor": tensor, "expert": expert})
        run = config.model_copy(update={"parallel": parallel})
        found = group_tokens(run, DrawnSteps((ranks,)))
        wanted = [
            RoutedTokens(n * image_tokens, positions - n * image_tokens)
            for n, positions in expected
        ]
        assert found[: len(wanted)] == wanted
    as_text = config.model_copy(
        update={"moe": config.moe.model_copy(update={"last_image_token_as_text": True})}
    )
    assert RoutedTokens.of([other], as_text).vision == 2 * (image_tokens - 1)
    assert RoutedTokens.of([other], as_text).text == 48 - 2 * (image_tokens - 1)
    alike = DrawnSteps.alike(Workload((one, other), "x"), 2)
    assert alike.steps == (((one, other), (one, other)),)


def test_a_layer_with_its_own_loads() -> None:
    loads = {"vision": (1.0, 1.0, 0.0, 0.0), "text": (0.0, 0.0, 1.0, 1.0)}
    routing = replace(balanced(E4), by_layer={3: loads})
    placement = Placement((0, 1, 2, 3), 2, 1.0, False)
    tokens = [RoutedTokens(10, 0)] * 2
    assert expert_load(routing, 3, placement, tokens, "moiie").received_N.tolist() == [20, 0]
    assert expert_load(routing, 3, placement, tokens, "alltoall").received_N.tolist() == [40, 0]
