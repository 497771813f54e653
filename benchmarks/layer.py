"""The MoIIE layer against its peers and against the matrix products alone, on one process.

Forward and backward of one layer over tokens of which most are image tokens.  The GEMM limit is
the same expert arithmetic - both products and the activation, forward and backward - on as many
rows (top-k per token) with one dense pair of weights: no router, no permutation, no grouping.

    python benchmarks/layer.py                       # all cases, as a table
    python benchmarks/layer.py --json FILE           # the same as JSON
    python benchmarks/layer.py --cases fp32,256-bf16
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from reference_model import LoopOverExperts
from torch import Tensor

from moiie_megatron.config.schema import ParallelConfig
from moiie_megatron.layout.token_types import IMAGE
from moiie_megatron.mcore.dist_env import DistEnv
from moiie_megatron.mcore.parallel import ParallelContext, destroy_parallel, init_parallel
from moiie_megatron.mcore.process_lifetime import run_child
from moiie_megatron.mcore.specs import submodules_of
from moiie_megatron.selftest.checks.layer_case import LAYOUT, Case, GemmLimit, moiie_layer
from moiie_megatron.utils.cpu_features import has_bf16_instructions
from moiie_megatron.utils.timing import interleave

SHAPES = ((1024, 3584), (256, 704))  # hidden, FFN
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PASSED_ON = ("tokens", "image-fraction", "rounds", "threads")  # to the processes of the cases
# By hidden size and dtype.
CASES = {f"{shape[0]}-{dtype}": (*shape, dtype) for shape in SHAPES for dtype in DTYPES}


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
) -> dict[str, Any]:
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
    return {
        "hidden": hidden,
        "ffn": ffn,
        "dtype": dtype,
        "limit_ms": 1e3 * timings.median("limit"),
        "moiie_over_limit": timings.ratio("moiie", "limit"),
        "peers_over_limit": {name: timings.ratio(name, "limit") for name in peers},
        "fastest_peer": fastest,
        "moiie_over_fastest_peer": timings.ratio("moiie", fastest),
    }


def row(result: dict[str, Any]) -> str:
    """A line of the table."""
    peers = "  ".join(f"{name} {ratio:.3f}" for name, ratio in result["peers_over_limit"].items())
    return (
        f"hidden {result['hidden']:5d}  ffn {result['ffn']:5d}  {result['dtype']}  "
        f"limit {result['limit_ms']:8.1f} ms  "
        f"| over limit: moiie {result['moiie_over_limit']:.3f}  {peers}  "
        f"| moiie over {result['fastest_peer']}: {result['moiie_over_fastest_peer']:.3f}"
    )


def case_of_its_own(case: tuple[int, int, str], options: argparse.Namespace) -> dict[str, Any]:
    """One case, in the process that it gets for itself."""
    torch.set_num_threads(options.threads)
    context = init_parallel(ParallelConfig(), DistEnv(), device="cpu")
    try:
        return compare(*case, context, options)
    finally:
        destroy_parallel()


def selected(words: str) -> list[str]:
    """The cases with one of these names or hidden sizes or dtypes, which commas separate."""
    chosen: set[str] = set()
    for word in words.split(","):
        found = {name for name in CASES if word in (name, *name.split("-"))}
        if not found:
            raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(CASES)}")
        chosen |= found
    return [name for name in CASES if name in chosen]


def cases_of_this_cpu() -> list[str]:
    """All cases; without the bf16 ones where they would take minutes."""
    if has_bf16_instructions() is not False:
        return list(CASES)
    note = "This CPU has no BF16 instructions: fp32 alone (--cases bf16 runs the others)."
    print(note, file=sys.stderr)
    return selected("fp32")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--cases",
        type=selected,
        help=f"names or parts of names, separated by commas: {', '.join(CASES)}; default: all, "
        "but bf16 only on a CPU with BF16 instructions",
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--image-fraction", type=float, default=0.71)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--only", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.only:
        print(json.dumps(case_of_its_own(CASES[options.only], options)))
        return
    results = []
    for name in options.cases or cases_of_this_cpu():
        # What one case leaves behind in the allocator would favour some systems in the next.
        words = [f"--{key}={vars(options)[key.replace('-', '_')]}" for key in PASSED_ON]
        output = run_child([sys.executable, __file__, "--only", name, *words])
        results.append(json.loads(output.splitlines()[-1]))
        print(row(results[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"cases": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
