"""How many kernels a layer starts for what is too small to be worth a kernel each.

On a GPU the router's tensors have a few numbers per token, so that a kernel takes less time than
starting it.  A change that needs more of them fails here; make room elsewhere or raise the budget
with a reason.
"""

from __future__ import annotations

import pytest

from moiie_megatron.mcore.parallel import ParallelContext
from tests.helpers.kernels import Kernels
from tests.unit.moe.layers import NoExperts, build_layer, router, tokens


@pytest.mark.parametrize("training", [True, False])
def test_router_forward(context: ParallelContext, training: bool) -> None:
    """The joint weight, the product; scores, top-k, routing map (2), scores of the chosen,
    softmax; in training also the sums of the balance loss: 2 conversions and a product."""
    module = router(context, alpha=0.01).train(training)
    hidden, types = tokens()
    with Kernels().recorded() as found:
        module(hidden, types)
    wanted = ["addmm", "cat", "eq", "scatter_", "softmax", "topk", "where", "where", "zeros_like"]
    if training:
        wanted += ["_to_copy", "bmm", "copy_"]
    assert sorted(found.counts.elements()) == sorted(wanted)
    assert found.counts.total() == (12 if training else 9)


def test_layer_forward(context: ParallelContext) -> None:
    """Router, dispatch and combine on one rank; with four of them: dispatcher_worker.py."""
    layer = build_layer(context, hidden=32).train()
    layer.experts = NoExperts()
    hidden, types = tokens()
    with Kernels(width=32).recorded() as found:
        layer(hidden, padding_mask=types.t())
    # The joint weight of the gates, copies to the experts, their sum.
    assert found.row_copies == {"cat": 1, "index_select": 1, "_embedding_bag_forward_only": 1}
    assert found.counts.total() <= 37, found.counts
