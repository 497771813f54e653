"""One rank of test_dispatcher.py: the MoIIE dispatcher against Megatron's and against a loop."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAlltoAllTokenDispatcher,
    MoETokenDispatcher,
)
from torch import Tensor

from moiie_megatron.config.schema import ParallelConfig
from moiie_megatron.mcore.dist_env import connect_store, dist_env_from
from moiie_megatron.mcore.parallel import ParallelContext, destroy_parallel, init_parallel
from moiie_megatron.moe.dispatcher import MoIIETokenDispatcher, destinations
from moiie_megatron.moe.layer import MoIIELayer
from tests.helpers.kernels import Kernels
from tests.parity import golden
from tests.parity.blocks import BLOCKS, MOIIE_8, build_layer, reference_names
from tests.unit.moe.layers import NoExperts

HIDDEN = 32


def routing(tokens: int, experts: int, top_k: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random scores (a leaf), the renormalised top-k weights, and the routing map."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(tokens, experts, generator=generator).requires_grad_()
    top, ids = torch.softmax(scores, dim=-1).topk(top_k, dim=-1)
    weights = top / top.sum(dim=-1, keepdim=True)
    probs = torch.zeros(tokens, experts).scatter(1, ids, weights)
    return scores, probs, torch.zeros(tokens, experts, dtype=torch.bool).scatter(1, ids, True)


def through(
    dispatcher: MoETokenDispatcher, layer: MoIIELayer, hidden: Tensor, probs: Tensor, map_: Tensor
) -> Tensor:
    """The six methods around the layer's experts, as ``MoELayer`` calls them."""
    rows, row_probs = dispatcher.dispatch_preprocess(hidden, map_, probs)
    rows, row_probs = dispatcher.token_dispatch(rows, row_probs)
    rows, counts, row_probs = dispatcher.dispatch_postprocess(rows, row_probs)
    output, _ = layer.experts(rows, counts, row_probs)
    output = dispatcher.token_combine(dispatcher.combine_preprocess(output))
    return dispatcher.combine_postprocess(output)


def make(
    cls: type[MoETokenDispatcher], layer: MoIIELayer, context: ParallelContext
) -> MoETokenDispatcher:
    return cls(layer.num_local_experts, layer.local_expert_indices, layer.config, context.groups)


def check_bitwise(
    layer: MoIIELayer, context: ParallelContext, dtype: torch.dtype, top_k: int = 2
) -> None:
    """Outputs and all gradients equal those of ``alltoall`` to the last bit."""
    layer.experts.to(dtype)
    tokens = 24 + 8 * context.rank  # ranks hold different numbers of tokens
    results = []
    for cls in (MoEAlltoAllTokenDispatcher, MoIIETokenDispatcher):
        scores, probs, map_ = routing(tokens, layer.config.num_moe_experts, top_k, context.rank)
        generator = torch.Generator().manual_seed(100 + context.rank)
        hidden = torch.randn(tokens, 1, HIDDEN, generator=generator).to(dtype).requires_grad_()
        upstream = torch.randn(tokens, 1, HIDDEN, generator=generator).to(dtype)
        layer.experts.zero_grad()
        output = through(make(cls, layer, context), layer, hidden, probs, map_)
        output.backward(upstream)
        weights = [parameter.grad for parameter in layer.experts.parameters()]
        results.append([output, hidden.grad, scores.grad, *weights])
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert torch.equal(ours, theirs), (dtype, (ours - theirs).abs().max())
    layer.experts.float()


def check_any_number_of_experts(layer: MoIIELayer, context: ParallelContext) -> None:
    """0 to 3 experts per token, one rank without any: equal to a loop over gathered experts."""
    experts = layer.config.num_moe_experts
    tokens = 20
    _, probs, map_ = routing(tokens, experts, 3, seed=7 + context.rank)
    fewer = torch.arange(tokens).unsqueeze(1) % 4  # keep the first 0, 1, 2 or 3 by expert id
    map_ = map_ & (map_.cumsum(dim=1) <= fewer)
    if context.rank == context.size - 1:
        map_ = torch.zeros_like(map_)
    probs = probs * map_
    hidden = torch.randn(tokens, 1, HIDDEN, generator=torch.Generator().manual_seed(context.rank))
    hidden.requires_grad_()
    layer.experts.zero_grad()
    output = through(make(MoIIETokenDispatcher, layer, context), layer, hidden, probs, map_)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(50 + context.rank))
    (grad,) = torch.autograd.grad(output, hidden, upstream)

    full = [_gather_experts(weight.detach(), context) for weight in layer.experts.parameters()]
    plain = hidden.detach().clone().requires_grad_()
    flat, want = plain.view(tokens, HIDDEN), []
    for token in range(tokens):
        total = flat[token] * 0.0  # a token without experts comes back as 0
        for expert in map_[token].nonzero().flatten().tolist():
            gate, up = (full[0][expert] @ flat[token]).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            total = total + probs[token, expert].detach() * (full[1][expert] @ inner)
        want.append(total)
    expected = torch.stack(want).view_as(output)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    (want_grad,) = torch.autograd.grad(expected, plain, upstream)
    torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(output[~map_.any(dim=1)], torch.zeros_like(output[~map_.any(dim=1)]))


def _gather_experts(weight: Tensor, context: ParallelContext) -> Tensor:
    parts = [torch.empty_like(weight) for _ in range(context.groups.ep.size())]
    dist.all_gather(parts, weight, group=context.groups.ep)
    return torch.cat(parts)


def check_rows_sent(layer: MoIIELayer, context: ParallelContext) -> None:
    """As many rows travel as there are distinct (token, rank) pairs; counted with sets."""
    experts, size = layer.config.num_moe_experts, context.groups.ep.size()
    _, probs, map_ = routing(64, experts, 2, seed=context.rank)
    dispatcher = make(MoIIETokenDispatcher, layer, context)
    rows, row_probs = dispatcher.dispatch_preprocess(torch.randn(64, 1, HIDDEN), map_, probs)
    pairs = {(t, e * size // experts) for t, e in map_.nonzero().tolist()}
    assert int(destinations(map_, size).sum()) == len(pairs)
    if size > 1:
        sent = sum(dispatcher.dispatched.counts.splits.input_splits)
        assert len(rows) == len(row_probs) == sent == len(pairs)
        assert len(pairs) < map_.sum(), "no token has two experts on one rank"


def check_kernels(layer: MoIIELayer) -> None:
    """A single expert per rank: few kernels, no copy of rows that sending does not need.

    The rows to send are gathered before the host waits for the row counts, so that the device
    has work while it does.
    """
    layer.train().experts = NoExperts()
    hidden = torch.randn(64, 1, HIDDEN)
    types = torch.arange(64, dtype=torch.int8).view(1, 64) % 2
    waits: list[dict[str, int]] = []  # what was copied before
    with (
        Kernels(width=HIDDEN).recorded() as found,
        patch.object(
            torch.cuda.Event, "synchronize", lambda _: waits.append(dict(found.row_copies))
        ),
    ):
        layer(hidden, padding_mask=types)
    weights, rows, sums = {"cat": 1}, {"index_select": 1}, {"_embedding_bag_forward_only": 1}
    assert found.row_copies == weights | rows | sums, found.row_copies
    assert found.counts.total() <= 40, found.counts
    assert waits == [weights | rows]


def check_golden(
    name: str, moe: dict[str, object], run: str, context: ParallelContext, ep: int
) -> None:
    """The reference's block, its tokens and experts spread over the ranks."""
    data, digests = golden.tensors(name), golden.numbers(name)[run]
    layer, case = build_layer(moe, "moiie", context, ParallelConfig(expert=ep)), run.split(".")[0]
    device = context.device.torch_device
    layer.to(device)
    rank, first = context.rank, context.groups.ep.rank() * layer.num_local_experts
    places = layer.physical_to_logical or range(layer.config.num_moe_experts)
    here = places[first : first + layer.num_local_experts]  # logical experts of this rank
    names = reference_names(layer)
    with torch.no_grad():
        for reference, ours in names.items():
            if not isinstance(ours, tuple):
                ours.copy_(data[f"weights.{reference}"])
            elif ours[1] in here:
                ours[0][here.index(ours[1])].copy_(data[f"weights.{reference}"])

    def mine(tensor: Tensor) -> Tensor:
        """This rank's part of ``(2, 24, ...)`` as ``(1, part, ...)``."""
        part = tensor.flatten(0, 1).chunk(context.size)[rank].unsqueeze(0)
        return part.contiguous().to(device)

    hidden = mine(data[f"{case}.hidden_states"]).requires_grad_()
    types = mine(data.get(f"{case}.token_type_ids", torch.zeros(2, 24))).to(torch.int8)
    output = layer(hidden.transpose(0, 1).contiguous(), padding_mask=types)[0].transpose(0, 1)
    golden.assert_close(output, mine(data[f"{run}.output"]), f"{name} output")
    (output * mine(data[f"{case}.upstream_grad"])).sum().backward()
    golden.assert_close(hidden.grad, mine(data[f"{run}.grad.hidden_states"]), f"{name} grad")
    for reference, ours in names.items():
        if not isinstance(ours, tuple):
            total = ours.grad.clone()
            dist.all_reduce(total)
            golden.assert_digest(total, digests[reference], reference)
        elif ours[1] in here:
            grad = ours[0].grad[here.index(ours[1])]
            golden.assert_digest(grad, digests[reference], reference)


def checks(ep: int, context: ParallelContext) -> Iterator[str]:
    """Run all checks of one world, on GPUs those with golden data; the name of each that passed."""
    layers = (({"variant": "moiie"}, "e4"), ({"variant": "moiie", **MOIIE_8}, "e8"))
    for moe, name in () if context.device.is_cuda else layers:
        layer = build_layer(moe, "alltoall", context, ParallelConfig(expert=ep))
        for dtype in (torch.float32, torch.bfloat16):
            check_bitwise(layer, context, dtype)
            yield f"bitwise {name} {dtype}"
        check_any_number_of_experts(layer, context)
        yield f"0 to k {name}"
        if layer.num_local_experts > 1:
            check_rows_sent(layer, context)
            yield f"rows {name}"
        else:
            check_kernels(build_layer(moe, "moiie", context, ParallelConfig(expert=ep)))
            yield f"kernels {name}"
    for name, moe, run in BLOCKS:
        check_golden(name, moe, run, context, ep)
        yield f"golden {name} {run}"


def main() -> None:
    launch = dist_env_from(os.environ)
    torch.set_num_threads(1)
    size = launch.world_size
    keys = dist.PrefixStore(f"ep{size}", connect_store(launch))
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    context = init_parallel(ParallelConfig(expert=size), launch, device=device, store=keys)
    passed = list(checks(size, context))
    if context.rank == 0:
        print(json.dumps(passed), flush=True)
    destroy_parallel()


if __name__ == "__main__":
    sys.exit(main())
