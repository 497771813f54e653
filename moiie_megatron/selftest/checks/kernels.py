"""Single operations against plain arithmetic in fp64 on the CPU."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moiie_megatron.mcore.attention import SDPACoreAttention
from moiie_megatron.mcore.packed_sequences import segments_of
from moiie_megatron.moe.expert_ffn import grouped_ffn
from moiie_megatron.selftest.check import Finding, Session, full_precision
from moiie_megatron.selftest.checks.compare import compare, merge

TOLERANCE: Final = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
_HIDDEN, _FFN = 64, 96
# Rows of every expert; some have none.
COUNTS: Final = ((16, 0, 5, 43), (0, 0, 64, 0), (0, 1, 1, 1), (40, 8, 8, 0))
SEGMENTS: Final = ((33,), (1, 20, 7, 36), (5, 5, 5))
_HEADS, _GROUPS, _HEAD_SIZE = 4, 2, 16


def check_grouped_mm(session: Session) -> Finding:
    """The experts' grouped matrix products against one expert after the other."""
    device = session.groups.device.torch_device
    findings = {}
    for dtype in TOLERANCE:
        for counts in COUNTS:
            case = f"{_name(dtype)} rows {' '.join(map(str, counts))}"
            with full_precision():
                findings[case] = _compare_experts(counts, dtype, device, case)
    return _summary(merge(findings), f"{len(findings)} cases")


def _compare_experts(
    counts: tuple[int, ...], dtype: torch.dtype, device: torch.device, case: str
) -> Finding:
    generator = torch.Generator().manual_seed(sum(counts))
    rows, experts = sum(counts), len(counts)
    shapes = ((rows, _HIDDEN), (rows,), (experts, 2 * _FFN, _HIDDEN), (experts, _HIDDEN, _FFN))
    inputs = [(torch.randn(shape, generator=generator) * 0.3).to(dtype) for shape in shapes]
    upstream = torch.randn(rows, _HIDDEN, generator=generator).to(dtype)
    per_expert = torch.tensor(counts)
    names = ("output/rows", "grad/rows", "grad/probs", "grad/fc1", "grad/fc2")

    here = [tensor.to(device).requires_grad_() for tensor in inputs]
    rows_RD, probs_R, fc1, fc2 = here
    output = grouped_ffn(rows_RD, probs_R, fc1, fc2, per_expert, F.silu)
    gradients = torch.autograd.grad(output, here, upstream.to(device))
    found = dict(zip(names, (output.detach(), *gradients), strict=True))

    exact = [tensor.double().requires_grad_() for tensor in inputs]
    rows_RD, probs_R, fc1, fc2 = exact
    plain = _experts_one_by_one(rows_RD, probs_R, fc1, fc2, counts)
    wanted_gradients = torch.autograd.grad(plain, exact, upstream.double())
    wanted = dict(zip(names, (plain.detach(), *wanted_gradients), strict=True))
    return compare(found, wanted, TOLERANCE[dtype], case)


def _experts_one_by_one(
    rows_RD: Tensor, probs_R: Tensor, fc1: Tensor, fc2: Tensor, counts: tuple[int, ...]
) -> Tensor:
    outputs = []
    for expert, rows in enumerate(rows_RD.split(counts)):
        gate, up = (rows @ fc1[expert].t()).chunk(2, dim=1)
        outputs.append((F.silu(gate) * up) @ fc2[expert].t())
    return torch.cat(outputs) * probs_R.unsqueeze(1)


def check_packed_attention(session: Session) -> Finding:
    """Attention on packed rows against every segment alone."""
    device = session.local.device
    findings = {}
    for dtype in TOLERANCE:
        for lengths in SEGMENTS:
            case = f"{_name(dtype)} segments {' '.join(map(str, lengths))}"
            with full_precision():
                findings[case] = _compare_attention(lengths, dtype, session, case)
    return _summary(merge(findings), f"{len(findings)} cases on {device.type}")


def _compare_attention(
    lengths: tuple[int, ...], dtype: torch.dtype, session: Session, case: str
) -> Finding:
    device = session.local.device
    attention = SDPACoreAttention(
        TransformerConfig(
            num_layers=1, hidden_size=64, num_attention_heads=_HEADS, attention_dropout=0.0
        ),
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
    )
    generator = torch.Generator().manual_seed(len(lengths))
    tokens = sum(lengths)
    shapes = [(tokens, heads, _HEAD_SIZE) for heads in (_HEADS, _GROUPS, _GROUPS)]
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    upstream = torch.randn(tokens, _HEADS * _HEAD_SIZE, generator=generator).to(dtype)
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    names = ("output/tokens", "grad/query", "grad/key", "grad/value")

    here = [tensor.to(device.torch_device).requires_grad_() for tensor in inputs]
    output = attention(*here, packed_seq_params=segments_of(ends, device))
    gradients = torch.autograd.grad(output, here, upstream.to(device.torch_device))
    found = dict(zip(names, (output.detach(), *gradients), strict=True))

    exact = [tensor.double().requires_grad_() for tensor in inputs]
    plain = torch.cat(
        [_attention(*part) for part in zip(*(t.split(lengths) for t in exact), strict=True)]
    )
    wanted_gradients = torch.autograd.grad(plain, exact, upstream.double())
    wanted = dict(zip(names, (plain.detach(), *wanted_gradients), strict=True))
    return compare(found, wanted, TOLERANCE[dtype], case)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of one segment: ``(s, n, d)``, ``(s, g, d)`` twice, to ``(s, n * d)``."""
    s, heads, size = query.shape
    key, value = (tensor.repeat_interleave(heads // tensor.shape[1], 1) for tensor in (key, value))
    scores_nss = torch.einsum("snd,tnd->nst", query, key) * size**-0.5
    later = torch.ones(s, s, dtype=torch.bool).triu(1)
    probs_nss = scores_nss.masked_fill(later, float("-inf")).softmax(-1)
    return torch.einsum("nst,tnd->snd", probs_nss, value).reshape(s, heads * size)


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def _summary(finding: Finding, cases: str) -> Finding:
    """Many cases in one sentence."""
    if finding.status != "PASS":
        return finding
    largest = max(max(case.values()) for case in finding.figures.values())
    return Finding("PASS", f"{cases}: differences up to {largest:.1e}", finding.figures)
