"""FLOPs of operations: torch's formulas, and those that it lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def _attention(
    query: Any, key: Any, value: Any, dropout_p: float = 0.0, is_causal: bool = False, **_: Any
) -> int:
    """Torch's count, of the half that a causal mask leaves."""
    return sdpa_flop_count(query.shape, key.shape, value.shape) // (2 if is_causal else 1)


def _attention_backward(
    grad: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    logsumexp: Any,
    dropout_p: float,
    is_causal: bool,
    **_: Any,
) -> int:
    count = sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)
    return count // (2 if is_causal else 1)


def _grouped(rows: Any, weights: Any, *_: Any, **__: Any) -> int:
    """Rows times the weights of their experts, or the gradient of all weights."""
    if rows.dim() == 2 and weights.dim() == 3:
        return 2 * rows.shape[0] * rows.shape[1] * weights.shape[2]
    return 2 * rows.shape[0] * rows.shape[1] * weights.shape[1]


FORMULAS: Final[dict[Any, Callable[..., int]]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._grouped_mm: _grouped,
}


def count_flops(operation: Any, args: Any, kwargs: dict[str, Any], out: Any) -> int:
    """FLOPs of one operation; 0 for those that are no product."""
    packet = operation._overloadpacket
    formula = FORMULAS.get(packet)
    if formula is not None:
        return formula(*args, **kwargs)
    formula = flop_registry.get(packet)
    if formula is None:
        return 0
    kwargs = {name: value for name, value in kwargs.items() if name != "out"}
    return int(formula(*args, **kwargs, out_val=out))
