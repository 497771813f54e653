"""Planned steps: sums of the data, and extremes by hand (tests/unit/data/audit: the loader)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.planning.samples.data_report import DataReport, read_report
from moiie_megatron.planning.samples.drawn_steps import BatchRules, draw_steps
from moiie_megatron.planning.samples.sample_pool import SamplePool
from moiie_megatron.planning.samples.step_workload import workload_of
from moiie_megatron.planning.workload import SampleShape, Workload
from moiie_megatron.selftest.checks.models import tiny_config
from tests.helpers.user_errors import user_error
from tests.unit.planning.samples.data_reports import Sizes, report_values, write_report

DP = 2


def run(length: int = 64, **train: int) -> RunConfig:
    config = tiny_config(1, "fp32")
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"sequence_length": length}),
            "train": config.train.model_copy(update=train),
        }
    )


def changed(config: RunConfig, **data: Any) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update=data)})


def report_of(folder: Path, *sources: Sizes, **options: Any) -> DataReport:
    return read_report(write_report(folder / "r.json", report_values(*sources, **options)))


def test_an_epoch_has_every_sample_by_its_weight(tmp_path: Path) -> None:
    """Half of 160 long samples and twice 100 short ones, of which 40 are skipped: in their place
    comes any sample that can be used."""
    long, short = [(60, 2, 5)] * 160, [(20, 0, 9), (20, 0, 8), (20, 1, 1)] * 20
    values = report_values(long, short, weights=(0.5, 2))
    values["sources"][1]["samples"] = 100
    pool = SamplePool(read_report(write_report(tmp_path / "r.json", values)), seed=3)
    assert pool.epoch_size == 80 + 200
    drawn = pool.draw(0, 10 * 280)
    assert {one.labels for one in drawn if one.tokens == 20} == {9, 8, 1}
    mean = pool.means()
    long_probability = (80 + 80 * 160 / 220) / 280
    assert mean.tokens == pytest.approx(20 + 40 * long_probability)
    # The replacement of each of the 40 is always the same one.
    assert np.mean([one.tokens for one in drawn]) == pytest.approx(mean.tokens, rel=0.1)
    assert np.mean([one.labels for one in drawn]) == pytest.approx(mean.labels, rel=0.1)
    entries = pool.entries()
    assert sum(weight for _, weight in entries) == pytest.approx(1)
    assert sum(w for one, w in entries if one.tokens == 60) == pytest.approx(long_probability)
    assert max(one.labels for one, _ in entries) == 9


def test_whole_epochs_are_drawn(tmp_path: Path) -> None:
    """Without skipped records the sums of the steps are those of the data."""
    sizes = [(n, n % 2, n % 7) for n in range(24, 56)]
    report = report_of(tmp_path, sizes)
    rules = BatchRules.of(run(global_batch_size=16, micro_batch_size=4), DP)
    drawn = draw_steps(rules, report)
    assert len(drawn.steps) == 64
    assert drawn.tokens_per_step == sum(tokens for tokens, _, _ in sizes) / 2
    assert drawn.images_per_step == 16 / 2
    assert draw_steps(rules, report) is drawn
    assert drawn.positions_per_step * (1 - drawn.padding_fraction) == pytest.approx(
        drawn.tokens_per_step
    )


def test_the_longest_samples_together(tmp_path: Path) -> None:
    sizes = [(20, 0, 4)] * 57 + [(50, 1, 9)] * 5 + [(64, 1, 9), (64, 2, 3)]
    report = report_of(tmp_path, sizes)
    typical, worst = workload_of(
        run(global_batch_size=32, micro_batch_size=4), dp_size=DP, report=report
    )
    assert len(typical.micro_batches) == len(worst.micro_batches) == 4
    assert worst.micro_batches[1:] == typical.micro_batches[1:]
    first = worst.micro_batches[0]
    assert [sample.tokens for sample in first.samples] == [64, 64, 50, 50]
    assert [sample.images for sample in first.samples] == [2, 1, 1, 1]
    assert first.length == 64 and first.positions == 256
    # 1 - (1 - 2 / 64) ** 32
    assert "a row of 64 tokens is in 64 % of the steps" in worst.origin


def test_a_full_row_with_the_most_images(tmp_path: Path) -> None:
    """Rows of 128 tokens: the cheapest image takes 20 of them, the next 24."""
    sizes = [(20, 1, 4)] * 3 + [(24, 1, 5)] * 20 + [(64, 1, 9)] * 20 + [(30, 0, 9)] * 21
    report = report_of(tmp_path, sizes)
    config = changed(run(global_batch_size=32, micro_batch_size=2), packing=True)
    typical, worst = workload_of(config, dp_size=DP, report=report)
    (row,) = worst.micro_batches[0].rows
    # 2 of the first kind, as many as 32 samples have of 3 in 64, or of the second.
    assert sum(one.images for one in row) == 5
    assert sum(one.tokens for one in row) <= 128 == config.micro_batch_shape[1]
    assert worst.micro_batches[1:] == typical.micro_batches[1:]
    assert "5 images" in worst.origin and "of the drawn steps" in worst.origin


@pytest.mark.parametrize("packing", [False, True])
def test_without_a_report(packing: bool) -> None:
    config = changed(run(global_batch_size=16, micro_batch_size=2), packing=packing)
    typical, worst = workload_of(config, dp_size=DP)
    assert len(typical.micro_batches) == len(worst.micro_batches) == 4
    for one in typical.micro_batches:
        assert one.positions == one.tokens == 128 and one.images == 2
        assert set(one.samples) == {SampleShape(64, 1, 24)}
    assert "rows of full length with 1 image per sample" in typical.origin and "50%" in (
        typical.origin
    )
    first = worst.micro_batches[0]
    assert first.positions == 128
    if packing:
        assert first.images == 128 // 17 == 7 and "7 images" in worst.origin
        assert all(one.labels == one.tokens - 16 > 0 for one in first.samples)
    else:
        assert set(first.samples) == {SampleShape(64, 1, 48)}
    (texts, _), (three, _) = (workload_of(config, dp_size=DP, images_per_sample=n) for n in (0, 3))
    assert texts.micro_batches[0].images == 0 and three.micro_batches[0].images == 6


def test_what_does_not_fit(tmp_path: Path) -> None:
    config = run(global_batch_size=16, micro_batch_size=2)
    with user_error("4 images of 16 tokens", "data.sequence_length", 64, "at most 3"):
        workload_of(config, dp_size=DP, images_per_sample=4)
    report = report_of(tmp_path, [(20, 0, 4)])
    with user_error("r.json", "1 images per sample"):
        workload_of(config, dp_size=DP, report=report, images_per_sample=1)
    with user_error("r.json", 96, "prepare_data.py validate"):
        workload_of(run(length=96), dp_size=DP, report=report)


def test_rows_that_the_interleaved_schedule_needs(tmp_path: Path) -> None:
    """Packed rows of a rank are a multiple of the pipeline ranks; rows are even in length."""
    sizes = [(int(n), 0, 4) for n in np.random.default_rng(0).integers(8, 30, 64)]
    report = report_of(tmp_path, sizes)
    config = changed(run(global_batch_size=32, micro_batch_size=2), packing=True)
    plain, _ = workload_of(config, dp_size=DP, report=report)
    parallel = config.parallel.model_copy(update={"pipeline": 4, "virtual_pipeline": 2})
    interleaved = config.model_copy(update={"parallel": parallel})
    typical, _ = workload_of(interleaved, dp_size=DP, report=report)
    assert len(plain.micro_batches) == 3 and len(typical.micro_batches) == 4
    assert isinstance(typical, Workload)


def test_rows_are_a_multiple_under_sequence_parallelism(tmp_path: Path) -> None:
    report = report_of(tmp_path, [(21, 0, 4), (30, 0, 4)])
    config = run(global_batch_size=16, micro_batch_size=2)
    parallel = config.parallel.model_copy(update={"tensor": 4})
    split = config.model_copy(update={"parallel": parallel})
    typical, _ = workload_of(split, dp_size=DP, report=report)
    assert {one.length for one in typical.micro_batches} <= {24, 32}
