"""The means that are logged, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moiie_megatron.config.load import load_config
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.routing_stats.counters import RouterLosses, RoutingCounters
from moiie_megatron.routing_stats.load_stats import LoadStats
from moiie_megatron.vlm.build import build_model
from tests.helpers.tiny_run import tiny_values, write_config


@pytest.fixture
def counters(tmp_path: Path, context: ParallelContext) -> RoutingCounters:
    values = tiny_values(tmp_path, tmp_path / "run")
    values["moe"] |= {"z_loss_coeff": 0.001}
    config = load_config(write_config(tmp_path / "run.yaml", values), [])
    return RoutingCounters(config, context, build_model(config, context))


def _count(
    stats: LoadStats, aux: tuple[float, float], z: tuple[float, float], tokens: tuple[int, int]
) -> None:
    """Count a micro-batch with these losses of the vision and the text router.

    Its tokens spread evenly over the three experts of their router, where the balance loss is
    twice the summed probability per token.
    """
    load = torch.tensor([[2.0], [2.0]]) * torch.tensor(tokens).unsqueeze(1) / 3
    prob = torch.tensor(aux).unsqueeze(1) * torch.tensor(tokens).unsqueeze(1) / 6
    scored = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 1.0]])
    stats.add_choices(prob * scored, load * scored, load * scored)
    stats.add_z(torch.tensor(z))


def test_the_mean_is_over_micro_batches_with_the_modality(counters: RoutingCounters) -> None:
    """Of three micro-batches one has images; all layers see the same."""
    assert len(counters.stats) == len(counters.layers) == 2
    for stats in counters.stats.values():
        _count(stats, aux=(2.0, 3.0), z=(0.5, 1.0), tokens=(4, 9))
        _count(stats, aux=(0.0, 1.0), z=(0.0, 2.0), tokens=(0, 9))
        _count(stats, aux=(0.0, 2.0), z=(0.0, 3.0), tokens=(0, 9))
    counters.count_step(3)
    assert counters.losses() == RouterLosses({"vision": 2, "text": 2}, {"vision": 0.5, "text": 2})


def test_no_token_of_a_modality_at_all(counters: RoutingCounters) -> None:
    for stats in counters.stats.values():
        _count(stats, aux=(0.0, 3.0), z=(0.0, 0.0), tokens=(0, 9))
    counters.count_step(1)
    assert counters.losses() == RouterLosses({"vision": 0, "text": 3}, {"vision": 0, "text": 0})
    assert counters.losses().aux == {"vision": 0, "text": 0}
