"""The means that are logged, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moiie_megatron.config.load import load_config
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.routing_stats.counters import RouterLosses, RoutingCounters
from moiie_megatron.vlm.build import build_model
from tests.helpers.tiny_run import tiny_values, write_config


@pytest.fixture
def counters(tmp_path: Path, context: ParallelContext) -> RoutingCounters:
    values = tiny_values(tmp_path, tmp_path / "run")
    values["moe"] |= {"z_loss_coeff": 0.001}
    config = load_config(write_config(tmp_path / "run.yaml", values), [])
    return RoutingCounters(config, context, build_model(config, context))


def test_the_mean_is_over_micro_batches_with_the_modality(counters: RoutingCounters) -> None:
    """Of three micro-batches one has images; all layers see the same."""
    assert len(counters.stats) == len(counters.layers) == 2
    for stats in counters.stats.values():
        stats.add_losses(torch.tensor([2.0, 3.0]), torch.tensor([0.5, 1.0]), torch.tensor([4, 9]))
        for aux, z in ((1.0, 2.0), (2.0, 3.0)):
            text = torch.tensor([0.0, aux]), torch.tensor([0.0, z])
            stats.add_losses(*text, torch.tensor([0, 9]))
    counters.count_step(3)
    assert counters.losses() == RouterLosses({"vision": 2, "text": 2}, {"vision": 0.5, "text": 2})


def test_no_token_of_a_modality_at_all(counters: RoutingCounters) -> None:
    for stats in counters.stats.values():
        stats.add_losses(torch.tensor([0.0, 3.0]), torch.zeros(2), torch.tensor([0, 9]))
    counters.count_step(1)
    assert counters.losses() == RouterLosses({"vision": 0, "text": 3}, {"vision": 0, "text": 0})
    assert counters.losses().aux == {"vision": 0, "text": 0}
