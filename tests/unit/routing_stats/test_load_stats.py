"""The counters of a layer, and the way of their sums to the host."""

from __future__ import annotations

import torch

from moiie_megatron.routing_stats.load_stats import LayerSums, LoadStats, routing_size

# Three tokens on two ranks: an image token, a text token, padding.
MASKS_TM = torch.tensor([[True, False], [False, True], [False, False]])
ROWS_TN = torch.tensor([[1, 1], [1, 0], [0, 1]])  # rows of each token on each rank


def counted() -> LoadStats:
    stats = LoadStats(num_routers=2, num_experts=3, device=torch.device("cpu"))
    for _ in range(2):  # micro-batches
        stats.add_tokens(
            torch.tensor([1, 1]),
            torch.tensor([[1, 1, 0], [0, 1, 1]]),
            torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.5, 0.5]], requires_grad=True),
        )
        stats.add_rows(MASKS_TM, ROWS_TN, own_rank=0)
        stats.add_losses(torch.tensor([2.0, 3.0]), torch.tensor([0.5, 0.0]))
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
    assert stats.losses().tolist() == [4.0, 6.0, 1.0, 0.0]
    stats.reset_losses()
    assert not stats.losses().any() and stats.routing().any()
    stats.reset_routing()
    assert not stats.routing().any()


def test_micro_batches_without_a_modality() -> None:
    """Two ranks share each micro-batch: one with text alone, one with both."""
    stats = LoadStats(num_routers=2, num_experts=3, device=torch.device("cpu"))
    for _ in range(2):
        stats.add_losses(torch.zeros(2), torch.zeros(2), torch.tensor([0.0, 7.0]), ranks=2)
        stats.add_losses(torch.zeros(2), torch.zeros(2), torch.tensor([3.0, 4.0]), ranks=2)
    assert stats.empty_G.tolist() == [1.0, 0.0]
    stats.reset_losses()
    assert not stats.empty_G.any()


def test_sums_are_no_part_of_a_checkpoint() -> None:
    assert counted().state_dict() == {}
