"""Fake tensors where torch's own rules stop, and what a simulation leaves behind."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from moiie_megatron.simulation.fake_values import ReadOfFakeValue, fake_tensors
from moiie_megatron.simulation.substitutes import building


def test_a_real_mask_tells_how_many_values_are_selected() -> None:
    mask = torch.tensor([[True, False, True], [False, False, True]])
    with fake_tensors():
        values = torch.rand(2, 3, requires_grad=True)
        selected = values.masked_select(mask)
        selected.sum().backward()
    assert isinstance(selected, FakeTensor)
    assert selected.shape == (3,) and values.grad is not None and values.grad.shape == (2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_of_both_precisions(dtype: torch.dtype) -> None:
    ends = torch.tensor([5, 7], dtype=torch.int32)
    with fake_tensors():
        rows = torch.empty(7, 16, dtype=dtype)
        weights = torch.empty(2, 16, 32, dtype=dtype)
        product = torch.nn.functional.grouped_mm(rows, weights, offs=ends)
    assert (product.shape, product.dtype) == ((7, 32), dtype)


def test_a_value_that_is_not_there_is_not_read() -> None:
    with fake_tensors() as values:
        number = torch.ones(())
        with pytest.raises(ReadOfFakeValue, match="substitutes.py"):
            number.item()
        with values.answering(3.0):
            assert number.item() == 3.0


def test_initialisers_that_a_library_keeps_work_afterwards() -> None:
    """Transformers keeps torch's initialisers when it is imported, which may be while a rank is
    simulated."""
    with building():
        kept = [torch.nn.init.trunc_normal_, torch.nn.init.normal_]
    for initialise in kept:
        weight = torch.zeros(64)
        initialise(weight)
        assert weight.count_nonzero() == 64
