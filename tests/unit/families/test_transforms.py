"""Transforms: the layout by hand, and exact inverses over many shapes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from moiie_megatron.families import transforms

# (heads, query groups): no sharing, sharing by 2 to 4, one key for all
HEADS = [(1, 1), (4, 4), (4, 2), (8, 2), (6, 3), (5, 1)]
SHAPES = [(*h, size, hidden) for h, size, hidden in itertools.product(HEADS, (1, 4), (1, 6))]


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_fused_rows_by_hand() -> None:
    """4 heads, 2 groups, head size 1: q0 q1 k0 v0 | q2 q3 k1 v1."""
    q = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    k, v = torch.tensor([[10.0], [11.0]]), torch.tensor([[20.0], [21.0]])
    fused = transforms.fuse_qkv(q, k, v, num_groups=2)
    assert fused.flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    stacked = torch.cat((q, k, v))
    assert torch.equal(transforms.fuse_stacked_qkv(stacked, 4, 2), fused)


def test_fused_biases_by_hand() -> None:
    """2 heads of 2 channels, each with a key of its own."""
    q, k, v = (torch.arange(4) + start for start in (0, 10, 20))
    transform = transforms.qkv(num_heads=2, num_groups=2)
    fused = transform.to_megatron((q, k, v))
    assert fused.tolist() == [0, 1, 10, 11, 20, 21, 2, 3, 12, 13, 22, 23]
    assert all(torch.equal(*pair) for pair in zip(transform.to_hf(fused), (q, k, v), strict=True))


def test_gate_comes_before_up() -> None:
    fused = transforms.fuse_gate_up(torch.zeros(3, 2), torch.ones(3, 2))
    assert fused[:, 0].tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(("heads", "groups", "size", "hidden"), SHAPES)
def test_qkv_inverts(heads: int, groups: int, size: int, hidden: int) -> None:
    q = _random(heads * size, hidden)
    k, v = _random(groups * size, hidden), _random(groups * size, hidden) + 1
    transform = transforms.qkv(heads, groups)
    full = transform.to_megatron((q, k, v))
    assert full.shape == ((heads + 2 * groups) * size, hidden)
    assert all(torch.equal(*pair) for pair in zip(transform.to_hf(full), (q, k, v), strict=True))
    assert torch.equal(transform.to_megatron(transform.to_hf(full)), full)


@pytest.mark.parametrize(("heads", "groups", "size", "hidden"), SHAPES)
def test_stacked_qkv_inverts(heads: int, groups: int, size: int, hidden: int) -> None:
    stacked = _random((heads + 2 * groups) * size, hidden)
    transform = transforms.stacked_qkv(heads, groups)
    full = transform.to_megatron((stacked,))
    assert torch.equal(transform.to_hf(full)[0], stacked)
    q, k, v = stacked.split([heads * size, groups * size, groups * size])
    assert torch.equal(transforms.qkv(heads, groups).to_megatron((q, k, v)), full)


@pytest.mark.parametrize(("ffn", "hidden"), [(1, 1), (3, 2), (8, 5)])
def test_gate_up_inverts(ffn: int, hidden: int) -> None:
    gate, up = _random(ffn, hidden), _random(ffn, hidden) + 1
    transform = transforms.gate_up()
    full = transform.to_megatron((gate, up))
    assert all(torch.equal(*pair) for pair in zip(transform.to_hf(full), (gate, up), strict=True))
