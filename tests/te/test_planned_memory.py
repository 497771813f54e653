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

ROWS = MicroBatchShape(((SampleShape(4096, 1, 1000),),), 4096)
# Bytes that a layer keeps with local modules over those with Transformer Engine's, without any
# recomputation: planned memory is on the safe side.
LEAST, MOST = 1.2, 1.8


def _scale(chunk_size: int, overflow: Any, tensors: Any, factor: float) -> None:
    """As the stand-in does, which also reads whether all values are finite."""
    for source, target in zip(*tensors, strict=True):
        target.copy_(source * factor)


def simulate(modules: str, layers: int) -> RankTrace:
    path = ROOT / "examples/configs/llama3-stage2.yaml"
    # Few logits: the stand-in for the fused cross-entropy keeps more than the real one.
    sizes = [f"language.num_layers={layers}", "language.vocab_size=1024", "vision.num_layers=3"]
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
    """What two more layers keep, a dense one and one with experts.

    Not the peaks of few layers: most of these is what the backward pass of one layer needs.
    """
    monkeypatch.setattr(clip_grads, "multi_tensor_scale_impl", _scale)
    kept = {}
    for modules in ("local", "auto"):
        few, more = (simulate(modules, layers) for layers in (2, 4))
        kept[modules] = more.memory.peak.total - few.memory.peak.total
        assert more.memory.states > few.memory.states
    assert LEAST <= kept["local"] / kept["auto"] <= MOST
