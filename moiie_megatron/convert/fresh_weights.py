"""Weights that no source holds: fresh routers, a fresh connector, noise on copied experts."""

from __future__ import annotations

import torch
from numpy.random import SeedSequence
from torch import Tensor

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.families.weight_map import WeightMapping
from moiie_megatron.moe.router_init import fresh_gate
from moiie_megatron.vlm.connector import Connector

_BLOCK = 1 << 22  # values that are held in fp32 at a time; part of what the noise is


def fresh_router(config: RunConfig, row: WeightMapping, dtype: torch.dtype) -> Tensor:
    """The router that training would start with in this place (``moe.router_init``)."""
    assert row.layer is not None
    return fresh_gate(
        row.full_shape,
        seed=config.train.seed,
        layer_number=row.layer + 1,
        router=config.moe.layout.routers.index(row.megatron.rpartition(".")[2]),
        std=config.moe.router_init_std,
    ).to(dtype)


def fresh_connector(config: RunConfig) -> dict[str, Tensor]:
    """PyTorch's initialisation of linear layers, as in training."""
    hidden = config.language.hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        inner = config.connector.hidden_size or hidden
        return Connector(config.vision.hidden_size, inner, hidden).state_dict()


def with_noise(
    tensor: Tensor, std: float, *, seed: int, layer: int, expert: int, part: int
) -> Tensor:
    """``tensor`` plus N(0, std * rms of the tensor), a pure function of the numbers given.

    Args:
        std: Relative to the root mean square of the tensor.
        layer: From 0.
        expert: Logical id.
        part: Tells the weights of one expert apart.

    Returns:
        A new tensor of the same dtype, rounded from fp32.
    """
    key = SeedSequence([seed, layer, expert, part])
    generator = torch.Generator().manual_seed(int(key.generate_state(1)[0]))
    flat = tensor.reshape(-1)
    scale = std * _rms(flat)
    result = torch.empty_like(flat)
    for start in range(0, flat.numel(), _BLOCK):
        values = flat[start : start + _BLOCK].float()
        noise = torch.randn(values.shape, generator=generator) * scale
        result[start : start + _BLOCK] = values + noise
    return result.view(tensor.shape)


def _rms(flat: Tensor) -> float:
    blocks = (flat[start : start + _BLOCK] for start in range(0, flat.numel(), _BLOCK))
    squares = sum(float(block.double().square().sum()) for block in blocks)
    return (squares / max(1, flat.numel())) ** 0.5
