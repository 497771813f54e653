"""The dispatcher on one process, by hand; several ranks are in tests/distributed.

Three tokens, four experts on two ranks (experts 0 and 1 on rank 0, 2 and 3 on rank 1):

    probs_TP     0      1   |   2      3
    token a     0.3    0.7  |   .      .
    token b      .     0.6  |  0.4     .
    token c      .      .   |   .      1.0
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.moe.dispatcher import MoIIETokenDispatcher, destinations, rows_by_rank
from tests.unit.moe.layers import config

PROBS = [[0.3, 0.7, 0, 0], [0, 0.6, 0.4, 0], [0, 0, 0, 1.0]]
probs_TP = torch.tensor(PROBS)
map_TP = probs_TP > 0


@pytest.fixture
def dispatcher(context: ParallelContext) -> MoIIETokenDispatcher:
    return MoIIETokenDispatcher(4, [0, 1, 2, 3], config(2), context.groups)


def dispatch(
    dispatcher: MoIIETokenDispatcher, hidden: Tensor, routing_map: Tensor, probs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows sorted by expert, rows per expert, and their probabilities."""
    rows = dispatcher.dispatch_preprocess(hidden, routing_map, probs)
    return dispatcher.dispatch_postprocess(*dispatcher.token_dispatch(*rows))


def combine(dispatcher: MoIIETokenDispatcher, output: Tensor) -> Tensor:
    output = dispatcher.token_combine(dispatcher.combine_preprocess(output))
    return dispatcher.combine_postprocess(output)


def test_destinations_by_hand() -> None:
    """a to rank 0 once though it has two experts there, b to both ranks, c to rank 1."""
    assert destinations(map_TP, 2).int().tolist() == [[1, 0], [1, 1], [0, 1]]
    assert destinations(map_TP, 1).int().tolist() == [[1], [1], [1]]


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("moiie", [[1, 0], [1, 1], [0, 1]]),
        ("flex", [[1, 0], [1, 1], [0, 1]]),
        ("alltoall", [[2, 0], [1, 1], [0, 1]]),
        ("allgather", [[1, 1], [1, 1], [1, 1]]),
    ],
)
def test_rows_of_every_dispatcher_by_hand(kind: str, rows: list[list[int]]) -> None:
    assert rows_by_rank(map_TP, 2, kind).int().tolist() == rows


def test_dispatch_by_hand(dispatcher: MoIIETokenDispatcher) -> None:
    """Sorted by expert, then by token:

    expert     0   1   1   2   3
    row        a   a   b   b   c
    prob      0.3 0.7 0.6 0.4 1.0
    """
    a, b, c = [1.0, 2.0], [3.0, 4.0], [5.0, 6.0]
    hidden = torch.tensor([a, b, c]).unsqueeze(1)  # (s, b, h)
    rows, counts, probs = dispatch(dispatcher, hidden, map_TP, probs_TP)
    assert rows.tolist() == [a, a, b, b, c]
    assert counts.tolist() == [1, 2, 1, 1] and counts.device.type == "cpu"
    assert torch.equal(probs, torch.tensor([0.3, 0.7, 0.6, 0.4, 1.0]))
    state = dispatcher.dispatched
    assert state is not None and state.to_ranks is None
    assert state.counts.splits.input_splits == state.counts.splits.output_splits == [3]

    # Outputs of the experts 10, 20, 30, 40, 50: a = 10 + 20, b = 30 + 40, c = 50.
    output = combine(dispatcher, torch.tensor([[10.0], [20], [30], [40], [50]]).expand(5, 2))
    assert output.shape == hidden.shape
    assert output.flatten().tolist() == [30, 30, 70, 70, 50, 50]


def test_a_chosen_expert_of_probability_zero_gets_its_row(
    dispatcher: MoIIETokenDispatcher,
) -> None:
    hidden = torch.ones(3, 1, 2)
    zero = torch.where(map_TP, 0.0, probs_TP)
    rows, counts, probs = dispatch(dispatcher, hidden, map_TP, zero)
    assert len(rows) == 5 and counts.tolist() == [1, 2, 1, 1] and not probs.any()


def test_a_token_without_experts_comes_back_as_zero(dispatcher: MoIIETokenDispatcher) -> None:
    only_b = map_TP & torch.tensor([[False], [True], [False]])
    hidden = torch.ones(3, 1, 2, requires_grad=True)
    rows, counts, _ = dispatch(dispatcher, hidden, only_b, probs_TP)
    assert counts.tolist() == [0, 1, 1, 0]
    output = combine(dispatcher, rows)
    assert output.flatten().tolist() == [0, 0, 2, 2, 0, 0]
    output.sum().backward()
    assert hidden.grad is not None and hidden.grad.flatten().tolist() == [0, 0, 2, 2, 0, 0]


def test_gradients_of_probabilities_by_hand(dispatcher: MoIIETokenDispatcher) -> None:
    """Each is the gradient of its own row: expert 0 gets a's 1, and so on."""
    probs = probs_TP.clone().requires_grad_()
    _, _, probs_X = dispatch(dispatcher, torch.ones(3, 1, 2), map_TP, probs)
    probs_X.backward(torch.tensor([1.0, 2, 3, 4, 5]))
    assert probs.grad is not None
    assert probs.grad.tolist() == [[1, 2, 0, 0], [0, 3, 4, 0], [0, 0, 0, 5]]
