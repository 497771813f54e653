"""What the MoIIE dispatcher sends and takes, against Megatron's alltoall, over real processes.

    torchrun --nproc-per-node 2 benchmarks/dispatch.py [--json FILE]
    torchrun --nproc-per-node 4 benchmarks/dispatch.py

Rows are counted twice: by the dispatcher, and as distinct (token, remote rank) pairs with Python
sets.  Times are forward and backward of the whole layer with the same experts, the slower rank,
interleaved; the same again with experts that only weigh their rows, which leaves routing and
dispatching alone; the placement is timed at 80 % image tokens against the contiguous order.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from moiie_megatron.config.schema import ParallelConfig
from moiie_megatron.layout.experts import ExpertLayout
from moiie_megatron.layout.placement import Placement, balanced, contiguous
from moiie_megatron.mcore.dist_env import dist_env_from
from moiie_megatron.mcore.parallel import ParallelContext, destroy_parallel, init_parallel
from moiie_megatron.mcore.process_lifetime import kill_children_on_exit
from moiie_megatron.moe.dispatcher import MoIIETokenDispatcher
from moiie_megatron.moe.layer import MoIIELayer
from moiie_megatron.selftest.checks.layer_case import Case, moiie_layer
from moiie_megatron.utils.timing import interleave, slower_rank

LAYOUTS = {4: ExpertLayout(1, 2, 1), 8: ExpertLayout(2, 4, 2)}


def build(
    case: Case,
    layout: ExpertLayout,
    placement: Placement,
    context: ParallelContext,
    *,
    moiie: bool = True,
) -> MoIIELayer:
    """A layer with this project's dispatcher or Megatron's alltoall."""
    return moiie_layer(
        case,
        context,
        layout=layout,
        dispatcher=MoIIETokenDispatcher if moiie else None,
        physical_to_logical=None if placement.is_identity else placement.physical_to_logical,
    )


class WeighingExperts(torch.nn.Module):
    """Next to no work: what is left of the layer's time is routing and dispatching."""

    def forward(
        self, rows: Tensor, tokens_per_expert: Tensor, probs: Tensor
    ) -> tuple[Tensor, None]:
        return rows * probs.unsqueeze(1), None


def step(case: Case, layer: MoIIELayer) -> Callable[[], None]:
    """Forward and backward; all ranks start together."""
    run = case.layer_step(layer)

    def together() -> None:
        dist.barrier()
        run()

    return together


def count_rows(case: Case, layer: MoIIELayer, context: ParallelContext) -> tuple[float, float]:
    """Rows that left this rank per token: as dispatched, and as distinct pairs."""
    with torch.no_grad():
        layer(case.hidden, padding_mask=case.token_types)
        _, map_TE = layer.router(case.hidden, case.token_types.transpose(0, 1))
    order = layer.physical_to_logical or range(map_TE.shape[1])
    place = {expert: number for number, expert in enumerate(order)}
    size = map_TE.shape[1] // context.size
    pairs = {(t, place[e] // size) for t, e in map_TE.nonzero().tolist()}
    remote = sum(rank != context.rank for _, rank in pairs)
    splits = layer.token_dispatcher.dispatched.counts.splits.input_splits
    sent = sum(splits) - splits[context.rank]
    counts = torch.tensor([sent, remote, len(map_TE)], dtype=torch.float64)
    dist.all_reduce(counts)
    return float(counts[0] / counts[2]), float(counts[1] / counts[2])


def loads(case: Case, layer: MoIIELayer, context: ParallelContext) -> float:
    """Largest over mean number of rows that the ranks' experts process."""
    with torch.no_grad():
        layer(case.hidden, padding_mask=case.token_types)
    mine = (
        layer.token_dispatcher.dispatched.counts.splits.tokens_per_expert.sum().double().reshape(1)
    )
    every = [torch.zeros_like(mine) for _ in range(context.size)]
    dist.all_gather(every, mine)
    rows: Tensor = torch.cat(every)
    return float(rows.max() / rows.mean())


def compare(
    experts: int, context: ParallelContext, options: argparse.Namespace
) -> dict[str, object]:
    """All figures for one number of experts."""
    layout, ep = LAYOUTS[experts], context.size

    def case(image_fraction: float) -> Case:
        made = Case.make(
            options.hidden, options.ffn, torch.float32, options.tokens, image_fraction, layout
        )
        made.config.expert_model_parallel_size = ep
        generator = torch.Generator().manual_seed(context.rank)
        made.hidden.copy_(torch.randn(made.hidden.shape, generator=generator))
        return made

    mixed, plain = case(0.71), contiguous(layout, ep)
    ours, theirs = (build(mixed, layout, plain, context, moiie=m) for m in (True, False))
    theirs.load_state_dict(ours.state_dict())
    rows, distinct = count_rows(mixed, ours, context)
    both = {"moiie": step(mixed, ours), "alltoall": step(mixed, theirs)}
    against = slower_rank(interleave(both, rounds=options.rounds))
    for layer in (ours, theirs):
        layer.experts = WeighingExperts()
    moving = slower_rank(interleave(both, rounds=options.rounds))
    images = case(0.8)
    layers = {
        "balanced": build(images, layout, balanced(layout, ep, image_fraction=0.8), context),
        "contiguous": build(images, layout, plain, context),
    }
    placed = slower_rank(
        interleave({n: step(images, layer) for n, layer in layers.items()}, rounds=options.rounds)
    )
    load = {
        share: {
            name: loads(at, build(at, layout, p, context), context) for name, p in orders.items()
        }
        for share in (0.2, 0.5, 0.8)
        for at in (case(share),)
        for orders in (
            {"balanced": balanced(layout, ep, image_fraction=share), "contiguous": plain},
        )
    }
    result = {
        "experts": experts,
        "ep": ep,
        "rows_per_token": rows,
        "distinct_rows_per_token": distinct,
        "moiie_over_alltoall": against.ratio("moiie", "alltoall"),
        "moiie_over_alltoall_without_experts": moving.ratio("moiie", "alltoall"),
        "balanced_over_contiguous": placed.ratio("balanced", "contiguous"),
        "max_over_mean_load": {str(share): values for share, values in load.items()},
    }
    if context.rank == 0:
        print(
            f"experts {experts}  EP {ep}  rows per token {rows:.3f} (distinct {distinct:.3f})  "
            f"time over alltoall {result['moiie_over_alltoall']:.3f} "
            f"(without experts {result['moiie_over_alltoall_without_experts']:.3f})  "
            f"balanced over contiguous {result['balanced_over_contiguous']:.3f}",
            flush=True,
        )
        for share, values in load.items():
            figures = "  ".join(f"{name} {value:.2f}" for name, value in values.items())
            print(f"    image share {share}: max/mean load {figures}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ffn", type=int, default=1792)
    parser.add_argument("--tokens", type=int, default=2048, help="per process")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    kill_children_on_exit()  # this process ends with torchrun, too
    torch.set_num_threads(1)
    dist_env = dist_env_from(os.environ)
    context = init_parallel(ParallelConfig(expert=dist_env.world_size), dist_env, device="cpu")
    cases = [compare(n, context, options) for n in LAYOUTS if n % context.size == 0]
    if context.rank == 0 and options.json:
        options.json.write_text(json.dumps({"cases": cases}, indent=2) + "\n")
    destroy_parallel()


if __name__ == "__main__":
    main()
