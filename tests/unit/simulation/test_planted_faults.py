"""What is changed in the program changes the prediction by its bytes: nothing is a formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moiie_megatron.moe.grouped_mlp import GroupedExperts
from moiie_megatron.simulation.fake_values import ReadOfFakeValue
from tests.unit.simulation.tiny import WORLD, simulate, simulated, tiny_config

CONFIG = tiny_config(tensor=2, expert=2)
HIDDEN = CONFIG.language.hidden_size
# A multiple of what Megatron pads its buffers to, so that no padding changes.
ELEMENTS = 1024
FORWARD, INIT = GroupedExperts.forward, GroupedExperts.__init__


class _Keeps(torch.autograd.Function):
    """Identity that keeps a copy of its input for the backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows.clone())
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _forward_with_copy(experts: GroupedExperts, rows: Tensor, *args: Any) -> Any:
    return FORWARD(experts, _Keeps.apply(rows), *args)


def _init_with_bias(experts: GroupedExperts, *args: Any, **kwargs: Any) -> None:
    INIT(experts, *args, **kwargs)
    experts.bias = torch.nn.Parameter(torch.zeros(ELEMENTS, dtype=torch.bfloat16))


def _forward_with_bias(experts: GroupedExperts, *args: Any) -> Any:
    output, _ = FORWARD(experts, *args)
    return output + experts.bias[: output.shape[1]], None


def _forward_that_reads(experts: GroupedExperts, *args: Any) -> Any:
    output, _ = FORWARD(experts, *args)
    return output * (2 if output.sum().item() > 0 else 1), None


def test_a_kept_copy_of_the_expert_input(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = simulated(0)
    monkeypatch.setattr(GroupedExperts, "forward", _forward_with_copy)
    faulty = simulate(CONFIG)
    assert faulty.expert_rows == sound.expert_rows
    assert len(sound.expert_rows) == 2  # layers whose copies all exist at the peak
    copies = sum(map(sum, sound.expert_rows.values())) * HIDDEN * 2
    assert copies > 0
    before, after = sound.memory.peak.activations, faulty.memory.peak.activations
    assert faulty.memory.peak.total - sound.memory.peak.total == copies
    assert {part: after[part] - before[part] for part in after if after[part] != before[part]} == {
        "experts": copies
    }
    assert faulty.memory.states == sound.memory.states


def test_one_more_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = simulated(0)
    monkeypatch.setattr(GroupedExperts, "__init__", _init_with_bias)
    monkeypatch.setattr(GroupedExperts, "forward", _forward_with_bias)
    faulty = simulate(CONFIG).memory
    added = 2 * ELEMENTS  # one in each layer with experts
    assert faulty.weights - sound.memory.weights == 2 * added
    assert faulty.gradients - sound.memory.gradients == 4 * added
    replicas = WORLD // CONFIG.parallel.expert
    assert faulty.optimizer - sound.memory.optimizer == 12 * added // replicas


def test_an_unknown_value_that_the_program_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupedExperts, "forward", _forward_that_reads)
    with pytest.raises(ReadOfFakeValue, match="simulation/substitutes.py"):
        simulate(CONFIG)
    assert not torch.distributed.is_initialized()  # nothing is left of it
