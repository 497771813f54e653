"""The bars of the expert figure are the logged shares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moiie_megatron.analysis.expert_use import expert_use_figure, mean_shares, plot_expert_use
from moiie_megatron.experts.layout import ExpertLayout

LAYOUT = ExpertLayout(1, 2, 1)


def record(vision: float) -> dict[str, Any]:
    """Top-2 shares of experts V0 S0 S1 T0; layer 11 sorts after 3 as a number only."""
    image, text = [vision, 1.0, 1.0 - vision, 0.0], [0.0, 0.5, 0.5, 1.0]
    return {"expert_share": {n: {"vision": image, "text": text} for n in ("3", "11")}}


RECORDS = [record(1.0), record(0.2), record(0.6)]


def test_mean_of_the_last_steps() -> None:
    shares = mean_shares(RECORDS, last=2)
    assert list(shares) == ["vision", "text"] and list(shares["vision"]) == [3, 11]
    np.testing.assert_allclose(shares["vision"][11], [0.2, 0.5, 0.3, 0.0])
    np.testing.assert_allclose(shares["text"][3], [0.0, 0.25, 0.25, 0.5])


def test_the_bars_are_the_shares() -> None:
    figure = expert_use_figure(mean_shares(RECORDS, last=2), LAYOUT)
    images, texts = figure.axes
    assert (images.get_title(), texts.get_title()) == ("image tokens", "text tokens")
    for axes, expected in ((images, [0.2, 0.5, 0.3, 0.0]), (texts, [0.0, 0.25, 0.25, 0.5])):
        heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
        np.testing.assert_allclose(heights, np.repeat(np.array(expected)[:, None], 2, axis=1))
        bottoms = [bars[0].get_y() for bars in axes.containers]
        np.testing.assert_allclose(bottoms, np.cumsum([0, *expected[:-1]]))
    assert [text.get_text() for text in images.get_xticklabels()] == ["3", "11"]
    assert "V0  20%" in {text.get_text() for text in images.texts}
    colours = [bars[0].get_facecolor() for bars in images.containers]
    assert len(set(colours)) == 4  # groups differ, and so do the experts of a group


def test_a_modality_without_tokens_and_a_joint_router() -> None:
    layout = ExpertLayout(0, 2, 0)
    shares = mean_shares([{"expert_share": {"1": {"joint": [0.0, 0.0]}}}])
    np.testing.assert_array_equal(shares["joint"][1], [0.0, 0.0])
    (axes,) = expert_use_figure(shares, layout).axes
    assert axes.get_title() == "all tokens"


def test_png(tmp_path: Path) -> None:
    file = plot_expert_use(RECORDS, LAYOUT, tmp_path / "use.png")
    with Image.open(file) as image:
        assert (image.format, image.size) == ("PNG", (975, 660))
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
    assert {(0xE6, 0x9F, 0x00), (0x8C, 0x8C, 0x8C), (0x00, 0x72, 0xB2)} <= colours


def test_refusals() -> None:
    with pytest.raises(ValueError, match="hold no expert_share"):
        mean_shares([{"step": 1, "expert_share": {}}])
    with pytest.raises(ValueError, match="have \\[4\\] experts, the layout 8"):
        expert_use_figure(mean_shares(RECORDS), ExpertLayout(2, 4, 2))
