"""The layer and the whole model against the same code on the CPU in one process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moiie_megatron.evaluation.layout_equivalence import record_step
from moiie_megatron.layout.experts import ExpertLayout
from moiie_megatron.layout.token_types import IMAGE, PADDING, TEXT
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.moe.dispatcher import MoIIETokenDispatcher
from moiie_megatron.moe.layer import MoIIELayer, moiie_module
from moiie_megatron.moe.router import RouterSettings
from moiie_megatron.selftest.check import Finding, Session, full_precision
from moiie_megatron.selftest.checks.compare import compare, merge
from moiie_megatron.selftest.checks.models import (
    NUM_EXPERTS,
    Precision,
    expert_parallel,
    micro_batches,
    seeded_weights,
    tiny_config,
)

DISPATCHERS: Final = ("moiie", "alltoall", "allgather")
DTYPES: Final[dict[Precision, torch.dtype]] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
}

# Largest differences, relative to the largest value of a tensor, that rounding explains.  bf16
# keeps 8 bits, and the errors of a whole model add up over its operations.
LAYER_TOLERANCE: Final[dict[Precision, float]] = {"fp32": 1e-4, "bf16": 4e-2}
MODEL_TOLERANCE: Final[dict[Precision, float]] = {"fp32": 1e-3, "bf16": 1.5e-1}
# Transformer Engine multiplies fp32 matrices with 10 bits (TF32).
TF32_TOLERANCE: Final = 5e-2
# Precision and packing.  Its attention on packed rows has no fp32 kernels.
TE_CASES: Final[tuple[tuple[Precision, bool], ...]] = (
    ("fp32", False),
    ("bf16", False),
    ("bf16", True),
)
_ROUNDED: Final = ("start/", "next/")
_ZERO: Final = "k_proj.bias"

_TOKENS, _HIDDEN, _FFN = 256, 64, 96
# Probability of an image token, and of padding in the last of them.
MIXES: Final = {"image": 1.0, "text": 0.0, "mixed": 0.7}
MODELS: Final = {"model": False, "model-packed": True}


def record(name: str, context: ParallelContext, ranks: int) -> dict[str, Tensor]:
    """The fp32 record that a check compares with; in one process on the CPU."""
    if name in MODELS:
        return record_model(context, ranks, "fp32", packing=MODELS[name])
    return record_layer(context, name.removeprefix("layer-"), "fp32", "moiie")


LAYER_REFERENCES: Final = tuple(f"layer-{mix}" for mix in MIXES)
MODEL_REFERENCES: Final = tuple(MODELS)


def check_layer(session: Session) -> Finding:
    """Forward and gradients of the MoIIE layer: every modality, dispatcher and precision."""
    context, findings = session.local, {}
    for mix in MIXES:
        wanted = session.references.get(f"layer-{mix}") if context.rank == 0 else {}
        for precision, dispatcher in [*((p, "moiie") for p in DTYPES), *_others()]:
            with full_precision():
                found = record_layer(context, mix, precision, dispatcher)
            if context.rank == 0:
                case = f"{mix} {precision} {dispatcher}"
                findings[case] = compare(found, wanted, LAYER_TOLERANCE[precision], case)
    return _shortened(merge(findings), f"{len(findings)} cases on EP {context.groups.ep.size()}")


def _others() -> list[tuple[Precision, str]]:
    return [("fp32", dispatcher) for dispatcher in DISPATCHERS if dispatcher != "moiie"]


def check_model(session: Session) -> Finding:
    """One step of a whole model with Megatron-Core's local modules."""
    context, findings = session.local, {}
    for name, packing in MODELS.items():
        wanted = session.references.get(name) if context.rank == 0 else {}
        for precision in DTYPES:
            with full_precision():
                found = record_model(context, context.size, precision, packing=packing)
            if context.rank == 0:
                case = f"{'packed' if packing else 'padded'} {precision}"
                findings[case] = compare_models(found, wanted, precision, case)
    return merge(findings)


def check_transformer_engine(session: Session) -> Finding:
    """One step of a whole model with Transformer Engine's modules, against the local ones."""
    findings = {}
    for precision, packing in TE_CASES:
        found, wanted = (
            record_model(context, context.size, precision, packing=packing)
            for context in (session.groups, session.local)
        )
        if session.groups.rank == 0:
            case = f"{'packed' if packing else 'padded'} {precision}"
            tolerance = TF32_TOLERANCE if precision == "fp32" else None
            findings[case] = compare_models(found, wanted, precision, case, tolerance)
    return merge(findings)


def compare_models(
    found: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    precision: Precision,
    case: str,
    tolerance: float | None = None,
) -> Finding:
    """Compare two records of a step.

    The biases of the keys are left out: they do not change the softmax, so their gradient is
    nothing but rounding errors.  In bf16 so are the weights after the step, which are rounded.
    """
    left, right = (
        {
            name: tensor
            for name, tensor in side.items()
            if not name.endswith(_ZERO) and (precision == "fp32" or not name.startswith(_ROUNDED))
        }
        for side in (found, wanted)
    )
    return compare(left, right, tolerance or MODEL_TOLERANCE[precision], case)


def record_model(
    context: ParallelContext, ranks: int, precision: Precision, *, packing: bool
) -> dict[str, Tensor]:
    """Losses, gradients and updated weights of one optimizer step, on rank 0.

    Args:
        ranks: Decides how many micro-batches the step has.
    """
    config = tiny_config(ranks, precision, packing=packing)
    config = config.model_copy(
        update={"parallel": config.parallel.model_copy(update={"expert": context.groups.ep.size()})}
    )
    batches = micro_batches(config, ranks, context.dp_rank, context.dp_size)
    return record_step(config, context, batches, seeded_weights(config)) or {}


def record_layer(
    context: ParallelContext, mix: str, precision: Precision, dispatcher: str
) -> dict[str, Tensor]:
    """Output and gradients of the layer on all tokens, on every rank.

    Each rank has its part of the tokens.  Without balance losses, which are means over the tokens
    of a rank, the numbers do not depend on how many ranks there are.
    """
    dtype, device = DTYPES[precision], context.device.torch_device
    layer = _layer(context, dtype, dispatcher)
    hidden_TD, types_T, gradient_TD = _layer_inputs(mix)
    part = [
        tensor.tensor_split(context.size)[context.rank]
        for tensor in (hidden_TD, types_T, gradient_TD)
    ]
    hidden = part[0].to(device, dtype).unsqueeze(1).requires_grad_()
    types = part[1].to(device).unsqueeze(0)
    output = layer(hidden, padding_mask=types)[0]
    output.backward(part[2].to(device, dtype).unsqueeze(1))
    assert hidden.grad is not None
    rows = {"output/hidden": output.detach(), "grad/hidden": hidden.grad}
    result = {name: _all_rows(tensor.squeeze(1).float(), context) for name, tensor in rows.items()}
    for name, gate in layer.router.gates.items():
        result[f"grad/gate {name}"] = _summed(gate.grad.float())
    first = context.groups.ep.rank() * layer.num_local_experts
    for name in ("weight_fc1", "weight_fc2"):
        local = getattr(layer.experts, name).grad.float()
        full = local.new_zeros(NUM_EXPERTS, *local.shape[1:])
        full[first : first + len(local)] = local
        result[f"grad/{name}"] = _summed(full)
    return {name: tensor.cpu() for name, tensor in result.items()}


def _layer(context: ParallelContext, dtype: torch.dtype, dispatcher: str) -> MoIIELayer:
    """A layer with the weights that ``_layer_weight`` draws."""
    layout = ExpertLayout.from_variant("moiie")
    config = TransformerConfig(
        num_layers=1,
        hidden_size=_HIDDEN,
        ffn_hidden_size=_FFN,
        moe_ffn_hidden_size=_FFN,
        num_attention_heads=4,
        num_moe_experts=layout.num_experts,
        moe_router_topk=layout.top_k,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall" if dispatcher == "moiie" else dispatcher,
        expert_model_parallel_size=expert_parallel(context.size),
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,
    )
    settings = RouterSettings(layout, dict.fromkeys(layout.routers, 0.0), init_std=0.3)
    spec = moiie_module(
        settings,
        context.groups,
        context.device.torch_device,
        dispatcher=MoIIETokenDispatcher if dispatcher == "moiie" else None,
    )
    layer = MoIIELayer(config, spec.submodules, layer_number=1, **spec.params)
    first = context.groups.ep.rank() * layer.num_local_experts
    with torch.no_grad():
        for number, gate in enumerate(layer.router.gates.values()):
            gate.copy_(_layer_weight(10 + number, tuple(gate.shape)))
        for number, name in enumerate(("weight_fc1", "weight_fc2")):
            weight = getattr(layer.experts, name)
            full = _layer_weight(number, (NUM_EXPERTS, *weight.shape[1:]))
            weight.copy_(full[first : first + layer.num_local_experts])
    return layer


def _layer_weight(seed: int, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).bfloat16().float()


def _layer_inputs(mix: str) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states ``(T, D)``, token types ``(T,)`` and the gradient of the output ``(T, D)``."""
    generator = torch.Generator().manual_seed(1)
    image_T = torch.rand(_TOKENS, generator=generator) < MIXES[mix]
    types_T = torch.where(image_T, IMAGE, TEXT).to(torch.int8)
    if mix == "mixed":
        types_T[torch.rand(_TOKENS, generator=generator) < 0.1] = PADDING
    hidden, gradient = (
        torch.randn(_TOKENS, _HIDDEN, generator=generator).bfloat16().float() for _ in range(2)
    )
    return hidden, types_T, gradient


def _all_rows(tensor: Tensor, context: ParallelContext) -> Tensor:
    """The rows of all ranks; ranks may have different numbers of them."""
    full = tensor.new_zeros(_TOKENS, tensor.shape[1])
    before = torch.arange(_TOKENS).tensor_split(context.size)[context.rank]
    full[before.to(full.device)] = tensor
    return _summed(full)


def _summed(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor


def _shortened(finding: Finding, summary: str) -> Finding:
    """Many cases in one sentence."""
    if finding.status != "PASS":
        return finding
    largest = max((max(case.values()) for case in finding.figures.values()), default=0.0)
    return Finding("PASS", f"{summary}: differences up to {largest:.1e}", finding.figures)
