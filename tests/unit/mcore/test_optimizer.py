"""Updates are skipped if the gradient is not finite or the caller says no; weights gather once."""

from __future__ import annotations

import math
from typing import Any

import pytest
from megatron.core.optimizer import OptimizerConfig

from moiie_megatron.mcore.optimizer import SkipNonFiniteOptimizer


class Part:
    """What ``ChainedOptimizer`` asks of the optimizers that it joins; notes the updates."""

    is_stub_optimizer = False

    def __init__(self, norm: float) -> None:
        self.norm, self.updates = norm, 0
        self.optimizer = self.model_chunks = self.param_groups = None
        self.config = OptimizerConfig(clip_grad=0.0)

    def prepare_grads(self) -> bool:
        return False

    def get_grad_norm(self) -> float:
        return self.norm

    def get_parameters(self) -> list[Any]:
        return []

    def step_with_ready_grads(self) -> bool:
        self.updates += 1
        for chunk in self.model_chunks or ():
            chunk.start_param_sync()
        return True


class Chunk:
    """A wrapper of a model; notes the gathers of its weights."""

    gathers = 0

    def start_param_sync(self) -> None:
        self.gathers += 1


def make(norm: float) -> tuple[SkipNonFiniteOptimizer, Part]:
    part = Part(norm)
    optimizer = SkipNonFiniteOptimizer.__new__(SkipNonFiniteOptimizer)
    optimizer.chained_optimizers = [part]
    optimizer.is_stub_optimizer = False
    optimizer.config = part.config
    return optimizer, part


@pytest.mark.parametrize(
    ("norm", "should_apply", "applied"),
    [
        (3.0, True, True),
        (0.0, True, True),
        (3.0, False, False),
        (math.nan, True, False),
        (math.inf, True, False),
    ],
)
def test_when_weights_change(norm: float, should_apply: bool, applied: bool) -> None:
    optimizer, part = make(norm)
    updated, found = optimizer.step_if(lambda: should_apply)
    assert (updated, part.updates) == (applied, int(applied))
    assert found == norm or (math.isnan(norm) and math.isnan(found))


def test_the_caller_is_not_asked_about_a_gradient_that_is_not_finite() -> None:
    optimizer, _ = make(math.nan)
    asked = []
    optimizer.step_if(lambda: asked.append(1) is None)
    assert asked == []


def test_weights_are_gathered_once() -> None:
    optimizer, first = make(1.0)
    second, chunk = Part(1.0), Chunk()
    optimizer.chained_optimizers.append(second)
    first.model_chunks = second.model_chunks = [chunk]
    # What step_if has set when step() comes to the update.
    optimizer._norm, optimizer._should_apply = 1.0, lambda: True
    assert optimizer.step_with_ready_grads()
    assert (first.updates, second.updates, chunk.gathers) == (1, 1, 1)
    assert first.model_chunks == [chunk]
