"""Two records of a step are compared relative to the size of what is compared."""

from __future__ import annotations

import math

import pytest
import torch

from moiie_megatron.evaluation.layout_equivalence import differences


def record(grad: float = 1.0, aux: tuple[float, ...] = (0.5,)) -> dict[str, torch.Tensor]:
    return {
        "start/w": torch.ones(2),
        "grad/w": torch.tensor([grad, -4.0]),
        "next/w": torch.tensor([0.9, 1.0]),
        "loss": torch.tensor(2.0),
        "eval_loss": torch.tensor(2.0),
        "aux": torch.tensor(aux),
    }


def test_relative_to_the_largest_value_of_a_tensor() -> None:
    worst = differences(record(1.2), record())
    assert worst["grad"] == (pytest.approx(0.05), "grad/w")
    assert {kind for kind, (error, _) in worst.items() if error} == {"grad"}


@pytest.mark.parametrize("in_reference", [False, True])
def test_a_nan_is_never_passed_over(in_reference: bool) -> None:
    """Also if another tensor of the same kind is looked at first and differs."""
    first = {"grad/a": torch.ones(2)}
    broken = first | record() | {"grad/w": torch.tensor([1.0, math.nan])}
    other = {"grad/a": torch.full((2,), 1.1)} | record()
    worst = differences(other, broken) if in_reference else differences(broken, other)
    assert worst["grad"] == (math.inf, "grad/w")


def test_a_dense_model_has_no_balance_losses() -> None:
    worst = differences(record(aux=()), record(aux=()))
    assert worst.keys() == {"grad", "next", "loss", "eval_loss"}


def test_other_tensors_are_an_error() -> None:
    with pytest.raises(ValueError, match="different tensors, such as grad/v"):
        differences(record() | {"grad/v": torch.ones(1)}, record())
