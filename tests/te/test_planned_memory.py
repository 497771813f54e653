"""What plans with local modules say of runs with Transformer Engine's (docs/planner.md).

tools/plan.py simulates Megatron-Core's local modules, because Transformer Engine's need a GPU.
Here both are simulated, at the full width of LLaMA-3-8B.
"""

from __future__ import annotations

from typing import Any

import pytest
from megatron.core.optimizer import clip_grads

from moiie_megatron.cli.plan_inputs import read_unset_config
from moiie_megatron.planning.routing import balanced
from moiie_megatron.planning.trace import RankTrace
from moiie_megatron.planning.workload import MicroBatchShape, SampleShape, Workload
from moiie_megatron.simulation.rank import simulate_rank
from tests.helpers.launch import ROOT

LAYERS = 4  # of 32, half of them with experts
ROWS = MicroBatchShape(((SampleShape(4096, 1, 1000),),), 4096)
# Activations with local modules over those with Transformer Engine's: on the safe side.
LEAST, MOST = 1.15, 1.6


def _scale(chunk_size: int, overflow: Any, tensors: Any, factor: float) -> None:
    """As the stand-in does, which also reads whether all values are finite."""
    for source, target in zip(*tensors, strict=True):
        target.copy_(source * factor)


def simulate(modules: str) -> RankTrace:
    path = ROOT / "examples/configs/llama3-stage2.yaml"
    # Few logits: the stand-in for the fused cross-entropy keeps more than the real one.
    sizes = [f"language.num_layers={LAYERS}", "language.vocab_size=1024", "vision.num_layers=4"]
    config = read_unset_config(path, [*sizes, "megatron={}"])
    train = config.train.model_copy(update={"transformer_impl": modules})
    return simulate_rank(
        config.model_copy(update={"train": train}),
        world=8,
        rank=2,
        workload=Workload((ROWS,), "one row"),
        routing=balanced(config.moe.layout),
    )


def test_local_modules_keep_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_grads, "multi_tensor_scale_impl", _scale)
    local, te = simulate("local"), simulate("auto")
    assert te.memory.states == local.memory.states
    assert te.expert_rows == local.expert_rows
    ratio = local.memory.peak.total / te.memory.peak.total
    assert LEAST <= ratio <= MOST
    assert all(
        te.memory.peak.activations[part] < local.memory.peak.activations[part]
        for part in ("attention", "dense_ffn", "experts")
    )
