"""Recomputing activations gives the same numbers, in every mode that Megatron-Core has."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.planning.flops import Work, model_flops
from tests.helpers.launch import ROOT
from tests.te.steps import (
    disagreement,
    fused_weight_gradients,
    packed,
    take_step,
    tiny_config,
    with_section,
)

FULL = {"recompute_granularity": "full", "recompute_num_layers": 1}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "uniform": FULL | {"recompute_method": "uniform"},
    "block": FULL
    | {"recompute_method": "block"},  # of the two layers the second, of experts, is not
    "core attention": {"recompute_modules": ["core_attn"]},
    "experts": {"recompute_modules": ["moe"]},
    "activation of experts": {"recompute_modules": ["moe_act"]},
    "norms": {"recompute_modules": ["layernorm"]},
    "dense ffn": {"recompute_modules": ["mlp"]},
    "several": {"recompute_modules": ["core_attn", "moe_act", "layernorm", "mlp"]},
}


class Operations(TorchDispatchMode):
    """Counts torch's operations, forward and backward."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", RECOMPUTE)
def test_recompute(te: ParallelContext, mode: str) -> None:
    """The same numbers as without, with more work; packed rows, fused weight gradients."""
    config = with_section(tiny_config(), "data", packing=True)
    records, counts = [], []
    for options in ({}, {"recompute_granularity": "selective"} | RECOMPUTE[mode]):
        changed = config.model_copy(update={"megatron": options})
        with fused_weight_gradients(), Operations() as operations:
            records.append(take_step(changed, te, packed()))
        counts.append(operations.count)
    plain, recomputed = records
    assert disagreement(recomputed, plain) == {}
    assert counts[1] > counts[0]


# Recomputed FLOPs over all others, and activations that a micro-batch keeps on a GPU, in GB.
SHIPPED = {
    "llama3-stage1": (0.0, 27.4),
    "llama3-stage2": (0.182, 7.0),
    "phi3-stage1": (0.0, 43.6),
    "phi3-stage2": (0.0, 18.8),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations(
    te: ParallelContext, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They recompute and keep what docs/benchmarks.md says, counted by the benchmark."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = importlib.import_module("recompute")
    path = ROOT / f"examples/configs/{name}.yaml"
    config = benchmark.load_example(path)
    plan = benchmark.plan_recompute(config, te, config.megatron)
    rows, length = config.micro_batch_shape
    if config.moe_layers:  # everything trains
        work = Work(tokens=length, labels=0, images=0, squared_lengths=length**2)
        assert plan.flops == pytest.approx(model_flops(config).of(work) / length, rel=0.01)
    kept = plan.kept * rows * length / config.parallel.tensor / 1e9
    fraction, size = SHIPPED[name]
    assert plan.fraction == (pytest.approx(fraction, abs=0.0005) if fraction else 0.0)
    assert kept == pytest.approx(size, abs=0.05)
    (row,) = re.findall(rf"\| {name} \| given \|.*", (ROOT / "docs/benchmarks.md").read_text())
    assert f"| {fraction:.1%} |" in row and f"| {size:.1f} |" in row
    comment = " ".join(line.strip("# ") for line in path.read_text().splitlines())
    assert f"{fraction:.0%}".replace("%", " %") in comment or not fraction


def test_the_demonstration_recomputes_nothing() -> None:
    for path in (ROOT / "examples/configs").glob("digits-*.yaml"):
        assert "recompute" not in path.read_text()
