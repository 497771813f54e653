"""Transformer Engine's modules compute the losses, gradients and updates of the local ones."""

from __future__ import annotations

from typing import Any

import fused_weight_gradient_mlp_cuda as apex
import pytest
import torch
import transformer_engine_torch as tex
from torch import Tensor

from moiie_megatron.mcore.parallel import ParallelContext
from tests.te.steps import (
    EXACT,
    FAMILIES,
    disagreement,
    fused_weight_gradients,
    packed,
    padded,
    take_step,
    tiny_config,
    with_section,
)


@pytest.mark.parametrize("rows", ["padded", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(te: ParallelContext, local: ParallelContext, family: str, rows: str) -> None:
    """Also the fused rotary embedding, which packed rows use."""
    config, batches = tiny_config(family), [padded()]
    if rows == "packed":
        config, batches = with_section(config, "data", packing=True), packed()
    want, got = (take_step(config, context, batches) for context in (local, te))
    assert disagreement(got, want) == {}


def distance(record: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[float, float]:
    """Of the loss, and of all gradients as one vector, relative."""
    grads = [name for name in exact if name.startswith("grad/")]
    ours, theirs = (torch.cat([r[name].flatten() for name in grads]) for r in (record, exact))
    loss = (record["loss"] / exact["loss"] - 1).abs()
    return float(loss), float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("rows", ["padded", "packed"])
def test_bf16(te: ParallelContext, local: ParallelContext, rows: str) -> None:
    """As far from fp32 as the local modules, which round at other places.

    Every token goes to all experts of its modality: rounding changes some choices of a router,
    and with them whole gradients.
    """
    config = with_section(
        with_section(tiny_config(), "moe", top_k=3), "data", packing=rows == "packed"
    )
    batches = [padded()] if rows == "padded" else packed()
    exact = take_step(config, local, batches)
    low = with_section(config, "train", precision="bf16")
    (local_loss, local_grad), (te_loss, te_grad) = (
        distance(take_step(low, context, batches), exact) for context in (local, te)
    )
    assert local_loss < 2e-3 and te_loss < 2e-3
    assert 1e-3 < local_grad < 3e-2
    assert te_grad < 1.3 * local_grad


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fused_weight_gradients(
    te: ParallelContext, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Added to the fp32 buffers inside the products: by Transformer Engine in its layers, by Apex
    in the output layer."""
    config = with_section(tiny_config(), "train", precision=precision)
    counts = {"te": 0, "apex": 0}
    gemm, accumulate = tex.generic_gemm, apex.wgrad_gemm_accum_fp32

    def counted_gemm(*args: Any, **kwargs: Any) -> Any:
        counts["te"] += bool(args[14])
        return gemm(*args, **kwargs)

    def counted_accumulate(*args: Any) -> None:
        counts["apex"] += 1
        accumulate(*args)

    monkeypatch.setattr(tex, "generic_gemm", counted_gemm)
    monkeypatch.setattr(apex, "wgrad_gemm_accum_fp32", counted_accumulate)
    batches = [padded(), padded(["text", "short"])]  # the second adds to the first
    plain = take_step(config, te, batches)
    assert counts == {"te": 0, "apex": 0}
    with fused_weight_gradients():
        fused = take_step(config, te, batches)
    # Otherwise a weight gradient is rounded to bf16 before it is added.
    limits = EXACT if precision == "fp32" else {"loss": 0.0, "grad": 1e-2}
    assert disagreement(fused, plain, limits) == {}
    assert counts == {"te": 2 * 6, "apex": 2}  # of 6 linear layers, and of the output layer
