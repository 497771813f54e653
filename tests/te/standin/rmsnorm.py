"""RMS normalisation over the last axis: ``y = x r (w + c)`` with ``r = 1 / sqrt(mean(x^2) + eps)``.

``c`` is 1 where weights are centred at zero, else 0.  Both directions compute in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.te.standin.enums import torch_dtype


def rmsnorm_fwd(
    input: Tensor,
    weight: Tensor,
    eps: float,
    ln_out: Tensor | None,
    quantizer: Any,
    otype: int,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Tensor, None, Tensor]:
    """y, no mean, and r as a vector."""
    if quantizer is not None:
        raise NotImplementedError("A quantised output has no stand-in.")
    x = input.float()
    r = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    y = (x * r * _factor(weight, zero_centered_gamma)).to(torch_dtype(otype))
    if ln_out is not None:
        y = ln_out.copy_(y)
    return y, None, r.flatten()


def rmsnorm_bwd(
    dz: Tensor,
    x: Tensor,
    rsigma: Tensor,
    gamma: Tensor,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight."""
    factor = _factor(gamma, zero_centered_gamma)
    grad = dz.reshape(x.shape).float()
    normed = x.float() * rsigma.view(*x.shape[:-1], 1)
    scaled = grad * factor
    along = (scaled * normed).mean(-1, keepdim=True)
    dx = rsigma.view(*x.shape[:-1], 1) * (scaled - normed * along)
    dw = (grad * normed).reshape(-1, x.shape[-1]).sum(0)
    return dx.to(dz.dtype), dw.to(gamma.dtype)


def _factor(weight: Tensor, zero_centered: bool) -> Tensor:
    return weight.float() + 1 if zero_centered else weight.float()
