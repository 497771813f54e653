"""What the loss figure shows is what was logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moiie_megatron.analysis.curves import curves_figure, plot_curves, step_figure
from tests.helpers.user_errors import user_error


def dense(step: int) -> dict[str, Any]:
    return {"step": step, "lm_loss": 4.0 / step, "lr_connector": 1e-3 * step}


def experts(step: int) -> dict[str, Any]:
    rates = {"lr_moe": 2e-3, "lr_vision": 1e-4}
    return {"step": step, "lm_loss": 2.0 / step, "aux_vision": 1.5, "aux_text": 2.5, **rates}


STAGES = {
    "first": [dense(step) for step in range(1, 11)],
    "second": [experts(step) for step in range(1, 6)],
}


def test_the_lines_are_the_input() -> None:
    loss, balance, rates = curves_figure(STAGES).axes
    raw = [line.get_xydata() for line in loss.get_lines() if line.get_alpha()]
    expected = [[(s, 4.0 / s) for s in range(1, 11)], [(10 + s, 2.0 / s) for s in range(1, 6)]]
    for line, points in zip(raw, expected, strict=True):
        np.testing.assert_allclose(line, points)
    labels = {line.get_label(): line.get_ydata() for line in balance.get_lines()}
    np.testing.assert_allclose(labels["vision router"], [1.5] * 5)
    np.testing.assert_allclose(labels["text router"], [2.5] * 5)
    parts = {line.get_label(): line.get_xydata() for line in rates.get_lines()}
    assert set(parts) == {"connector", "moe", "vision"}
    np.testing.assert_allclose(parts["connector"][-1], (10, 1e-2))
    np.testing.assert_allclose(parts["moe"][0], (11, 2e-3))
    assert [text.get_text() for text in loss.texts] == ["first", "second"]


def test_smooth_line_follows_the_median() -> None:
    spike = [dense(s) | {"lm_loss": 100.0 if s == 30 else 1.0} for s in range(1, 61)]
    loss = curves_figure({"only": spike}).axes[0]
    (smooth,) = [line for line in loss.get_lines() if not line.get_alpha()]
    assert smooth.get_ydata().max() == 1.0


def test_dense_stages_have_no_balance_panel() -> None:
    assert len(curves_figure({"first": STAGES["first"]}).axes) == 2


def test_rates_have_a_panel_where_they_are_logged() -> None:
    old = [{"step": s, "lm_loss": 1.0, "tokens_per_second": 10.0 * s} for s in (1, 2)]
    new = [line | {"mfu": 0.4, "data_wait_fraction": 0.01 * line["step"]} for line in old]
    assert len(step_figure({"old": old}, (6, 4)).axes) == 2
    figure = step_figure({"old": old, "new": new}, (6, 4))
    tokens, mfu, wait, _ = figure.axes
    assert figure.get_size_inches().tolist() == [6, 8]
    (line,) = [line for line in wait.get_lines() if line.get_alpha()]
    np.testing.assert_allclose(line.get_xydata(), [(3, 0.01), (4, 0.02)])
    assert len(tokens.get_lines()) == 4 and mfu.get_lines()[0].get_ydata()[0] == 0.4


def test_png(tmp_path: Path) -> None:
    file = plot_curves(STAGES, tmp_path / "new" / "losses.png")
    with Image.open(file) as image:
        assert (image.format, image.size) == ("PNG", (1350, 1050))
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20
    assert [path.name for path in file.parent.iterdir()] == ["losses.png"]


def test_nothing_to_plot(tmp_path: Path) -> None:
    with user_error("stages", ["a"]):
        plot_curves({"a": []}, tmp_path / "losses.png")
    with user_error("stages", []):
        plot_curves({}, tmp_path / "losses.png")
