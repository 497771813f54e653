"""Compares two records of named tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from torch import Tensor

from moiie_megatron.evaluation.layout_equivalence import differences
from moiie_megatron.selftest.check import Finding, failed, passed

# Where several kinds differ, the first of these is nearest to the cause.
_ORDER: Final = ("output", "eval_loss", "loss", "aux", "grad", "next")


def compare(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float, what: str
) -> Finding:
    """Whether two records agree.

    A difference is relative to the largest absolute value of its tensor
    (``evaluation/layout_equivalence.py``).

    Args:
        found: Tensors by ``kind/name``.
        wanted: The same names.
        tolerance: The largest difference that passes.
        what: What was compared, for the sentence.
    """
    odd = sorted(found.keys() ^ wanted.keys())
    if odd:
        return failed(f"{what}: only one side has {', '.join(odd[:3])}")
    not_finite = [name for name, tensor in found.items() if not tensor.isfinite().all()]
    if not_finite:
        return failed(f"{what}: {not_finite[0]} is not finite")
    worst = differences(
        {name: tensor.float().cpu() for name, tensor in found.items()},
        {name: tensor.float().cpu() for name, tensor in wanted.items()},
    )
    figures = {kind: float(f"{difference:.2e}") for kind, (difference, _) in worst.items()}
    for kind in sorted(worst, key=_ORDER.index):
        difference, name = worst[kind]
        if not difference <= tolerance:
            return failed(
                f"{what}: {name} differs by {difference:.1e} of its largest value, more than the "
                f"{tolerance:.1e} that rounding explains",
                **figures,
            )
    return passed(f"{what}: differences up to {max(figures.values()):.1e}", **figures)


def merge(findings: Mapping[str, Finding]) -> Finding:
    """One finding for several comparisons: the first that failed, or all of them."""
    figures = {name: finding.figures for name, finding in findings.items() if finding.figures}
    bad = next((finding for finding in findings.values() if finding.status == "FAIL"), None)
    if bad is not None:
        return failed(bad.reason, **figures)
    return passed("; ".join(finding.reason for finding in findings.values()), **figures)
