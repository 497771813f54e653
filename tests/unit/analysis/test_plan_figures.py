"""Figures of plans that were made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from moiie_megatron.analysis.plan_figures import memory_figure, plot_memory, plot_scaling
from moiie_megatron.planning.hardware import GIB, gpu
from moiie_megatron.planning.plans.plan import make_plan
from moiie_megatron.planning.search.scaling import plan_scaling
from tests.unit.planning.traces import MadeSimulation, inputs, shipped


def test_memory_of_every_stage_that_differs(tmp_path: Path) -> None:
    config = shipped("llama3-stage2", "parallel.pipeline=4")
    plan = make_plan(config, 64, gpu("h100"), inputs(), MadeSimulation())
    figure = memory_figure(plan)
    assert len(figure.axes) == 3
    for axes, stage in zip(figure.axes, plan.stages, strict=True):
        tops = [path.get_paths()[0].vertices[:, 1].max() for path in axes.collections]
        assert max(tops) == pytest.approx(stage.memory.total / GIB)
        assert plan.hardware.memory / GIB in [line.get_ydata()[0] for line in axes.lines]
        assert [label.get_text() for label in axes.get_xticklabels()] == [
            "forward",
            "backward",
            "update",
        ]
    with Image.open(plot_memory(plan, tmp_path / "new" / "memory.png")) as picture:
        assert picture.format == "PNG" and picture.width > 1000


def test_scaling(tmp_path: Path) -> None:
    points = plan_scaling(
        shipped("llama3-stage2"), (8, 64), gpu("h100"), inputs(), MadeSimulation()
    )
    with Image.open(plot_scaling(points, tmp_path / "scaling.png")) as picture:
        assert picture.width > 1000
