"""From a data set to a planned step: the report of ``validate`` against the loader of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.audit.audit import audit
from moiie_megatron.data.audit.report import data_report, summarize
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.data.stream.build import build_dataset, build_train_loader
from moiie_megatron.planning.samples.data_report import DataReport, read_report
from moiie_megatron.planning.samples.drawn_steps import BatchRules, draw_steps
from moiie_megatron.planning.samples.sample_pool import SamplePool
from moiie_megatron.planning.samples.step_workload import workload_of
from moiie_megatron.selftest.checks.models import tiny_config
from tests.helpers.thread_ranks import ThreadRank, on_ranks

GLOBAL, MICRO, DP = 16, 2, 2
EPOCH = 23 + 9  # the corpus, and 0.4 of it again
STEPS = 32  # of the loader; 16 epochs


@pytest.fixture
def config(corpus: Path, phi3_model: Path) -> RunConfig:
    """A run on two sources whose samples have 20 to 70 tokens: none is truncated."""
    source = {"records": str(corpus / "records.jsonl"), "images": str(corpus / "images")}
    values = tiny_config(1, "fp32").model_dump()
    values["data"] |= {
        "sources": [source, source | {"weight": 0.4, "name": "again"}],
        "tokenizer": str(phi3_model),
        "sequence_length": 80,
        "num_workers": 0,
    }
    values["stage"] |= {"template": "phi3"}
    values["train"] |= {"global_batch_size": GLOBAL, "micro_batch_size": MICRO}
    return RunConfig.model_validate(values)


@pytest.fixture
def report(config: RunConfig, tmp_path: Path) -> DataReport:
    """As ``prepare_data.py validate`` writes it."""
    dataset = build_dataset(config)
    audits = [audit(source, dataset.encoding) for source in dataset.sources]
    values = data_report([summarize(one, dataset.encoding) for one in audits], dataset.encoding)
    (tmp_path / "report.json").write_text(json.dumps(values))
    return read_report(tmp_path / "report.json")


def micro_batches(config: RunConfig) -> list[Batch]:
    """Those of training, of all ranks and steps."""
    dataset = build_dataset(config)

    def own(rank: ThreadRank) -> list[Batch]:
        loader = build_train_loader(
            config, dataset, consumed_samples=0, dp_rank=rank.dp_rank, dp_size=DP, ranks=rank
        )
        return [batch for _ in range(STEPS) for batch in next(loader)]

    return [batch for rank in on_ranks(DP, own) for batch in rank]


@pytest.mark.parametrize(
    ("packing", "padding"), [(False, "longest"), (True, "sequence_length"), (True, "longest")]
)
def test_planned_steps_are_like_those_of_training(
    config: RunConfig, report: DataReport, packing: bool, padding: str
) -> None:
    """Over whole epochs.

    Tokens and labels agree to 1 %: an epoch has nine samples of the second source, and the order
    decides which.  Padding agrees to 1.5 % of the positions, because it depends on the order too.
    """
    changes: dict[str, Any] = {"packing": packing, "padding": padding}
    run = config.model_copy(update={"data": config.data.model_copy(update=changes)})
    real = micro_batches(run)
    tokens = sum(int(batch.sample_lengths.sum()) for batch in real) / STEPS
    images = sum(len(batch.images) for batch in real) / STEPS
    labels = sum(batch.num_label_tokens for batch in real) / STEPS
    padded = 1 - tokens * STEPS / sum(batch.tokens.numel() for batch in real)

    drawn = draw_steps(BatchRules.of(run, DP), report)
    means = SamplePool(report, run.train.seed).means()
    assert len(drawn.steps) * GLOBAL % EPOCH == 0
    assert drawn.tokens_per_step == pytest.approx(tokens, rel=0.01)
    assert drawn.images_per_step == pytest.approx(images, rel=0.02)
    assert means.tokens * GLOBAL == pytest.approx(tokens, rel=0.01)
    assert means.images * GLOBAL == pytest.approx(images, rel=0.02)
    assert means.labels * GLOBAL == pytest.approx(labels, rel=0.01)
    assert drawn.padding_fraction == pytest.approx(padded, abs=0.015)
    assert padded == 0 if (packing and padding == "longest") else padded > 0.05
    planned = sum(1 for _ in drawn.micro_batches) / len(drawn.steps)
    assert planned == pytest.approx(len(real) / STEPS, rel=0.02)

    typical, _ = workload_of(run, dp_size=DP, report=report)
    assert len(typical.micro_batches) == round(planned / DP)
    samples = [sample for one in typical.micro_batches for sample in one.samples]
    for found, mean in (
        (sum(one.tokens for one in samples), tokens),
        (sum(one.images for one in samples), images),
        (sum(one.labels for one in samples), labels),
    ):
        assert found == pytest.approx(mean / DP, rel=0.08)
    positions = sum(one.positions for one in typical.micro_batches)
    if padding == "longest":
        assert positions == pytest.approx(tokens / (1 - padded) / DP, rel=0.08)
    else:  # whole rows
        assert positions == len(typical.micro_batches) * run.micro_batch_shape[1]
    assert typical.origin == "samples of report.json, the most typical of 64 steps"


def test_one_source_without_a_choice_is_exact(config: RunConfig, report: DataReport) -> None:
    """Every epoch has every sample once: the sums are those of the loader."""
    sources = config.data.sources[:1]
    changes: dict[str, Any] = {"sources": sources}
    alone = config.model_copy(update={"data": config.data.model_copy(update=changes)})
    dataset = build_dataset(alone)
    encoded = [dataset[i].encoded for i in range(23)]
    one = DataReport(report.name, 80, report.num_image_tokens, report.sources[:1])
    samples = SamplePool(one, 5).draw(23, 23)
    assert sorted((s.tokens, s.images, s.labels) for s in samples) == sorted(
        (len(e.tokens), len(e.images), int((e.labels != -100).sum())) for e in encoded
    )
