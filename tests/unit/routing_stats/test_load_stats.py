"""The counters of a layer, and the way of their sums to the host."""

from __future__ import annotations

import torch
from torch import Tensor

from moiie_megatron.layout.experts import ExpertLayout
from moiie_megatron.routing_stats.load_stats import LayerSums, LoadStats, routing_size

# Three tokens on two ranks: an image token, a text token, padding.
MASKS_MT = torch.tensor([[True, False, False], [False, True, False]])
LAYOUT = ExpertLayout(num_vision=1, num_shared=1, num_text=1)
ROWS_TN = torch.tensor([[1, 1], [1, 0], [0, 1]])  # rows of each token on each rank


def measure(prob: Tensor, all_load: Tensor) -> tuple[Tensor, Tensor]:
    """Something to add up, and tokens."""
    return prob.sum(dim=2) + all_load.sum(dim=2), all_load.sum(dim=2) / 2


def counted() -> LoadStats:
    stats = LoadStats(2, LAYOUT, torch.device("cpu"), measure)
    for _ in range(2):  # micro-batches
        load = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
        prob = torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.5, 0.5]])
        stats.add_choices(prob, load, 2 * load)
        stats.add_rows(MASKS_MT, ROWS_TN)
        stats.add_z(torch.tensor([0.5, 0.0]))
    return stats


def test_sums_by_hand() -> None:
    vector = counted().routing()
    assert vector.shape == (routing_size(3),)
    sums = LayerSums.from_vector(vector, 3)
    assert sums == LayerSums(
        tokens_M=[2, 2],
        load_ME=[[2, 2, 0], [0, 2, 2]],
        prob_ME=[[1.5, 0.5, 0.0], [0.0, 1.0, 1.0]],
        rows_A=[4, 2, 8],  # image, text, all with padding
        remote_A=[2, 0, 4],
    )


def test_what_was_read_is_reset_apart() -> None:
    stats = counted()
    assert stats.losses().tolist() == [10.0, 10.0, 1.0, 0.0]  # of a micro-batch: 1 + 2 * 2
    stats.reset_losses()
    assert not stats.losses().any() and stats.routing().any()
    stats.reset_routing()
    assert not stats.routing().any()


def test_what_is_collected_is_bounded() -> None:
    stats = LoadStats(2, LAYOUT, torch.device("cpu"), measure)
    one = torch.ones(2, 3)
    for _ in range(300):
        stats.add_choices(one, one, one)
    assert stats.load_ME.any()  # added up before it was read
    sums = LayerSums.from_vector(stats.routing(), 3)
    assert sums.load_ME == [[300] * 3] * 2 and sums.tokens_M == [450, 450]


def test_micro_batches_without_a_modality() -> None:
    """Two ranks share each micro-batch: one with text alone, one with both."""
    stats = LoadStats(2, LAYOUT, torch.device("cpu"), measure, ranks=2)
    text, both = torch.tensor([[0.0] * 3, [7.0] * 3]), torch.ones(2, 3)
    for _ in range(2):
        for load in (text, both):
            stats.add_choices(load, load, load)
    stats.add_up()
    assert stats.empty_G.tolist() == [1.0, 0.0]
    stats.reset_losses()
    assert not stats.empty_G.any()


def test_sums_are_no_part_of_a_checkpoint() -> None:
    assert counted().state_dict() == {}
