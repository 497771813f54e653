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
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from reference_model import LoopOverExperts
from timing import interleave
from torch import Tensor

from moiie_megatron.config.schema import ParallelConfig
from moiie_megatron.layout.experts import ExpertLayout
from moiie_megatron.layout.token_types import IMAGE, TEXT
from moiie_megatron.mcore.parallel import DistEnv, destroy_parallel, init_parallel
from moiie_megatron.mcore.specs import submodules_of
from moiie_megatron.moe.layer import MoIIELayer, moiie_module
from moiie_megatron.moe.router import RouterSettings

SHAPES = ((1024, 3584), (256, 704))  # hidden, FFN
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUT = ExpertLayout.from_variant("moiie")


@dataclass(frozen=True)
class Case:
    """One shape: hidden states ``(s, 1, h)``, token types ``(1, s)`` and the gradient."""

    config: TransformerConfig
    hidden: Tensor
    token_types: Tensor
    gradient: Tensor

    @classmethod
    def make(
        cls,
        hidden: int,
        ffn: int,
        dtype: torch.dtype,
        tokens: int,
        image_fraction: float,
        layout: ExpertLayout = LAYOUT,
    ) -> Case:
        config = TransformerConfig(
            num_layers=1,
            hidden_size=hidden,
            ffn_hidden_size=ffn,
            moe_ffn_hidden_size=ffn,
            num_attention_heads=8,
            num_moe_experts=layout.num_experts,
            moe_router_topk=layout.top_k,
            moe_router_dtype="fp32",
            moe_router_load_balancing_type="aux_loss",
            moe_aux_loss_coeff=0.001,
            moe_token_dispatcher_type="alltoall",
            gated_linear_unit=True,
            activation_func=F.silu,
            add_bias_linear=False,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            use_cpu_initialization=True,
        )
        generator = torch.Generator().manual_seed(0)
        types = torch.where(
            torch.rand(1, tokens, generator=generator) < image_fraction, IMAGE, TEXT
        )
        shape = (tokens, 1, hidden)
        return cls(
            config,
            torch.randn(shape, generator=generator).to(dtype),
            types.to(torch.int8),
            torch.randn(shape, generator=generator).to(dtype),
        )

    def step(self, forward: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        """Forward and backward with gradients for the input and all weights."""

        def run() -> None:
            hidden = self.hidden.detach().requires_grad_()
            forward(hidden).backward(self.gradient)

        return run


def moiie(case: Case, groups: ProcessGroupCollection) -> Callable[[Tensor], Tensor]:
    """This project's layer."""
    coeffs = {"vision": 0.001, "text": 0.001}
    settings = RouterSettings(LAYOUT, coeffs, init_std=0.02)
    spec = moiie_module(settings, groups, torch.device("cpu"))
    layer = MoIIELayer(case.config, spec.submodules, layer_number=1, **spec.params)
    return lambda hidden: layer(hidden, padding_mask=case.token_types)[0]


def megatron(
    case: Case, groups: ProcessGroupCollection, dispatcher: str
) -> Callable[[Tensor], Tensor]:
    """Megatron-Core's MoELayer with its sequential experts (one router for all tokens)."""
    spec = get_moe_module_spec(use_te=False, num_experts=LAYOUT.num_experts)
    case.config.moe_token_dispatcher_type = dispatcher
    layer = MoELayer(case.config, submodules_of(spec), layer_number=1, pg_collection=groups)
    return lambda hidden: layer(hidden)[0]


def loop_over_experts(case: Case) -> Callable[[Tensor], Tensor]:
    """The plain MoE block of ``reference_model.py``."""
    config = case.config
    block = LoopOverExperts(config.hidden_size, config.ffn_hidden_size, LAYOUT, config.params_dtype)
    is_image_T = case.token_types.reshape(-1) == IMAGE
    block.masks = {"vision": is_image_T, "text": ~is_image_T}
    return block


class GemmLimit(torch.nn.Module):
    """The experts' arithmetic on ``top_k`` rows per token with one dense pair of weights."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        h, f = case.config.hidden_size, case.config.ffn_hidden_size
        dtype = case.config.params_dtype
        self.up = torch.nn.Linear(h, 2 * f, bias=False, dtype=dtype)
        self.down = torch.nn.Linear(f, h, bias=False, dtype=dtype)
        rows = case.hidden.shape[0] * LAYOUT.top_k
        generator = torch.Generator().manual_seed(1)
        self.rows = torch.randn(rows, h, generator=generator).to(dtype).requires_grad_()
        self.gradient = torch.randn(rows, h, generator=generator).to(dtype)

    def step(self) -> None:
        gate, up = self.up(self.rows).chunk(2, dim=-1)
        self.down(F.silu(gate) * up).backward(self.gradient)


def compare(
    hidden: int, ffn: int, dtype: str, groups: ProcessGroupCollection, options: argparse.Namespace
) -> dict[str, object]:
    """Time all systems on one shape."""
    case = Case.make(hidden, ffn, DTYPES[dtype], options.tokens, options.image_fraction)
    peers = {
        "megatron alltoall": case.step(megatron(case, groups, "alltoall")),
        "megatron allgather": case.step(megatron(case, groups, "allgather")),
        "loop over experts": case.step(loop_over_experts(case)),
    }
    runs = {"limit": GemmLimit(case).step, "moiie": case.step(moiie(case, groups)), **peers}
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
        return compare(*shape, context.groups, options)
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
