"""The MoIIE layer against its peers and against the matrix products alone, on one process.

Forward and backward of one layer over tokens of which most are image tokens.  The GEMM limit is
the same expert arithmetic - both products and the activation, forward and backward - on as many
rows (top-k per token) with one dense pair of weights: no router, no permutation, no grouping.

    python benchmarks/layer.py                # table
    python benchmarks/layer.py --json FILE    # the same as JSON
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from reference_model import LoopOverExperts
from torch import Tensor

from moiie_megatron.config.schema import ParallelConfig
from moiie_megatron.layout.token_types import IMAGE
from moiie_megatron.mcore.dist_env import DistEnv
from moiie_megatron.mcore.parallel import ParallelContext, destroy_parallel, init_parallel
from moiie_megatron.mcore.specs import submodules_of
from moiie_megatron.selftest.checks.layer_case import LAYOUT, Case, GemmLimit, moiie_layer
from moiie_megatron.utils.timing import interleave

SHAPES = ((1024, 3584), (256, 704))  # hidden, FFN
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def megatron(case: Case, context: ParallelContext, dispatcher: str) -> Callable[[Tensor], Tensor]:
    """Megatron-Core's MoELayer with its sequential experts (one router for all tokens)."""
    spec = get_moe_module_spec(use_te=False, num_experts=LAYOUT.num_experts)
    case.config.moe_token_dispatcher_type = dispatcher
    layer = MoELayer(case.config, submodules_of(spec), layer_number=1, pg_collection=context.groups)
    return lambda hidden: layer(hidden)[0]


def loop_over_experts(case: Case) -> Callable[[Tensor], Tensor]:
    """The plain MoE block of ``reference_model.py``."""
    config = case.config
    block = LoopOverExperts(config.hidden_size, config.ffn_hidden_size, LAYOUT, config.params_dtype)
    is_image_T = case.token_types.reshape(-1) == IMAGE
    block.masks = {"vision": is_image_T, "text": ~is_image_T}
    return block


def compare(
    hidden: int, ffn: int, dtype: str, context: ParallelContext, options: argparse.Namespace
) -> dict[str, object]:
    """Time all systems on one shape."""
    case = Case.make(hidden, ffn, DTYPES[dtype], options.tokens, options.image_fraction)
    peers = {
        "megatron alltoall": case.step(megatron(case, context, "alltoall")),
        "megatron allgather": case.step(megatron(case, context, "allgather")),
        "loop over experts": case.step(loop_over_experts(case)),
    }
    ours = case.layer_step(moiie_layer(case, context))
    runs = {"limit": GemmLimit(case).step, "moiie": ours, **peers}
    timings = interleave(runs, rounds=options.rounds)
    fastest = timings.fastest(list(peers))
    result = {
        "hidden": hidden,
        "dtype": dtype,
        "moiie_over_limit": timings.ratio("moiie", "limit"),
        "fastest_peer": fastest,
        "moiie_over_fastest_peer": timings.ratio("moiie", fastest),
    }
    others = "  ".join(f"{name} {timings.ratio(name, 'limit'):.3f}" for name in peers)
    print(
        f"hidden {hidden:5d}  ffn {ffn:5d}  {dtype}  limit {timings.median('limit') * 1e3:8.1f} ms"
        f"  | over limit: moiie {result['moiie_over_limit']:.3f}  {others}"
        f"  | moiie over {fastest}: {result['moiie_over_fastest_peer']:.3f}",
        flush=True,
    )
    return result


def case_of_its_own(shape: tuple[int, int, str], options: argparse.Namespace) -> dict[str, object]:
    """One case, in the process that it gets for itself."""
    torch.set_num_threads(options.threads)
    context = init_parallel(ParallelConfig(), DistEnv(), device="cpu")
    try:
        return compare(*shape, context, options)
    finally:
        destroy_parallel()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--image-fraction", type=float, default=0.71)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    cases = []
    for hidden, ffn in SHAPES:
        for dtype in DTYPES:
            # What one case leaves behind in the allocator would favour some systems in the next.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                future = process.submit(case_of_its_own, (hidden, ffn, dtype), options)
                cases.append(future.result())
    if options.json:
        options.json.write_text(json.dumps({"cases": cases}, indent=2) + "\n")


if __name__ == "__main__":
    main()
