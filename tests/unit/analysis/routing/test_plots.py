"""The figures show the fractions of the records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moiie_megatron.analysis.routing.groups import groups_figure, plot_groups
from moiie_megatron.analysis.routing.load_map import load_map_figure, plot_load_map, relative_loads
from moiie_megatron.analysis.routing.pathways import pathways_figure, plot_pathways
from moiie_megatron.analysis.routing.plots import plot_routing
from moiie_megatron.routing_stats.expert_use import ExpertUse
from moiie_megatron.routing_stats.reading import newest
from tests.helpers.user_errors import user_error
from tests.unit.routing_stats.routing_records import RECORDS, record

COLOURS = {"vision": (0xE6, 0x9F, 0x00), "shared": (0x8C, 0x8C, 0x8C), "text": (0x00, 0x72, 0xB2)}
USE = ExpertUse.from_records(newest(RECORDS, 15))


def test_a_modality_without_tokens_is_not_drawn() -> None:
    use = ExpertUse.from_records([record(10, [0] * 4, [0, 5, 5, 10])])
    assert [len(figure(use).axes) for figure in (pathways_figure, groups_figure)] == [1, 1]


def test_bars_are_the_fractions() -> None:
    """Choices of a token add up to top-k, bars to 1; the own expert is below the shared ones."""
    images, texts = groups_figure(USE).axes
    for axes, expected in ((images, [0.2, 0.5, 0.3]), (texts, [0.5, 0.25, 0.25])):
        heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
        np.testing.assert_allclose(heights, np.repeat(np.array(expected)[:, None], 2, axis=1))
        bottoms = [bars[0].get_y() for bars in axes.containers]
        np.testing.assert_allclose(bottoms, np.cumsum([0, *expected[:-1]]))
        assert len({bars[0].get_facecolor() for bars in axes.containers}) == 3
    assert [text.get_text() for text in texts.get_xticklabels()] == ["3", "11"]
    assert "V0  20%" in {text.get_text() for text in images.texts}


def test_bands_are_as_wide_as_the_fractions() -> None:
    images, texts = pathways_figure(USE).axes
    for axes, fractions in ((images, [0.4, 1.0, 0.6]), (texts, [0.5, 0.5, 1.0])):
        widths = [np.ptp(band.get_paths()[0].vertices[:, 1]) for band in axes.collections]
        np.testing.assert_allclose(widths, [0.8 * share for share in fractions])
        assert [label.get_text() for label in axes.get_yticklabels()] == ["V0", "S0", "S1", "T0"]
    assert {text.get_text() for text in images.texts} == {"40%", "100%", "60%"}
    assert images.get_title(loc="left").startswith("image tokens")


def test_load_over_training() -> None:
    """40 choices for four experts: 10 is an equal share."""
    loads = relative_loads(RECORDS)
    assert loads.shape == (3, 2, 4)
    np.testing.assert_allclose(loads[1, 0], [0.2, 1.5, 1.3, 1.0])
    silent = relative_loads([record(1, [0] * 4, [0] * 4)])
    np.testing.assert_array_equal(silent, np.ones((1, 2, 4)))
    axes = load_map_figure(RECORDS).axes[0]
    (mesh,) = axes.collections
    np.testing.assert_allclose(mesh.get_array(), loads.reshape(3, 8).T)
    # Columns end at the step of their record.
    assert sorted(set(mesh.get_coordinates()[0, :, 0])) == [0, 10, 20, 25]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["3", "11"]


@pytest.mark.parametrize("plot", [plot_pathways, plot_groups])
def test_png_in_the_colours_of_the_groups(plot: object, tmp_path: Path) -> None:
    file = plot(USE, tmp_path / "new" / "figure.png")
    with Image.open(file) as image:
        assert image.format == "PNG" and min(image.size) > 300
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
    assert set(COLOURS.values()) <= colours
    assert [path.name for path in file.parent.iterdir()] == ["figure.png"]


def test_all_figures_of_a_run_and_of_a_checkpoint(tmp_path: Path) -> None:
    names = ["pathways.png", "groups.png", "load_map.png"]
    assert [file.name for file in plot_routing(RECORDS, tmp_path / "run")] == names
    measured = [{key: value for key, value in RECORDS[0].items() if not key.startswith("step")}]
    assert [file.name for file in plot_routing(measured, tmp_path / "ckpt")] == names[:2]
    sizes = [file.stat().st_size for file in tmp_path.rglob("*.png")]
    assert len(sizes) == 5 and min(sizes) > 5000


def test_many_layers_are_drawn_without_numbers(tmp_path: Path) -> None:
    many = [record(10, [5, 5, 10, 0], [0, 5, 5, 10], layers=tuple(range(1, 33, 2)))]
    use = ExpertUse.from_records(many)
    assert not pathways_figure(use).axes[0].texts and not groups_figure(use).axes[0].texts
    assert plot_load_map(many, tmp_path / "map.png").stat().st_size > 5000


def test_refusals() -> None:
    other = [*RECORDS, record(30, [6, 10, 4, 0], [0, 5, 5, 10], layers=(1,))]
    with user_error("routing records", 2):
        relative_loads(other)
