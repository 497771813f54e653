"""Each check finds the kind of fault that it is for.

The checks run without one in ``tests/cli/test_selftest.py``, and the first test of each pair here
shows that the fault is what turns the verdict.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moiie_megatron.config.schema import ParallelConfig
from moiie_megatron.mcore.attention import SDPACoreAttention
from moiie_megatron.mcore.dist_env import DistEnv
from moiie_megatron.mcore.parallel import ParallelContext, destroy_parallel, init_parallel
from moiie_megatron.moe.router import ModalityRouter
from moiie_megatron.selftest.check import Finding, Session
from moiie_megatron.selftest.checks import training
from moiie_megatron.selftest.checks.collectives import check_collectives
from moiie_megatron.selftest.checks.kernels import check_grouped_mm, check_packed_attention
from moiie_megatron.selftest.checks.parity import (
    LAYER_REFERENCES,
    MODEL_REFERENCES,
    check_layer,
    check_model,
    record,
)
from moiie_megatron.training import run
from tests.unit.selftest.sessions import Known, session

Plant = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    torch.set_num_threads(1)
    yield init_parallel(ParallelConfig(), DistEnv(), device="cpu", seed=1)
    destroy_parallel()


@pytest.fixture(scope="module")
def given(context: ParallelContext, tmp_path_factory: pytest.TempPathFactory) -> Session:
    """With what the CPU computes while nothing is wrong."""
    made = session(context, tmp_path_factory.mktemp("selftest"))
    assert isinstance(made.references, Known)
    for name in (*LAYER_REFERENCES, *MODEL_REFERENCES):
        made.references.records[name] = record(name, context, 1)
    return made


def wrong_last_expert(patch: pytest.MonkeyPatch) -> None:
    """grouped_mm takes the weights of the first expert for the last one, too."""
    original = F.grouped_mm

    def grouped_mm(rows: Tensor, weights: Tensor, *, offs: Tensor) -> Tensor:
        return original(rows, torch.cat([weights[:-1], weights[:1]]), offs=offs)

    patch.setattr(F, "grouped_mm", grouped_mm)


def attention_across_segments(patch: pytest.MonkeyPatch) -> None:
    original = SDPACoreAttention.forward

    def forward(self: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any):  # type: ignore[no-untyped-def]
        segments = options.get("packed_seq_params")
        if segments is not None:
            segments.lengths = (sum(segments.lengths),)
        return original(self, query, key, value, *rest, **options)

    patch.setattr(SDPACoreAttention, "forward", forward)


def images_as_text(patch: pytest.MonkeyPatch) -> None:
    original = ModalityRouter.forward

    def forward(self: Any, hidden: Tensor, token_types: Tensor) -> tuple[Tensor, Tensor]:
        return original(self, hidden, torch.zeros_like(token_types))

    patch.setattr(ModalityRouter, "forward", forward)


def half_balance_loss(patch: pytest.MonkeyPatch) -> None:
    original = ModalityRouter._loss_gradient

    def loss_gradient(self: Any, all_load_ME: Tensor) -> Tensor:
        return original(self, all_load_ME) * 0.5

    patch.setattr(ModalityRouter, "_loss_gradient", loss_gradient)


def wrong_all_to_all(patch: pytest.MonkeyPatch) -> None:
    """An all-to-all brings other values."""
    original = dist.all_to_all_single

    def all_to_all_single(output: Tensor, given: Tensor, *rest: Any) -> None:
        original(output, given + 1, *rest)

    patch.setattr(dist, "all_to_all_single", all_to_all_single)


FAULTS: list[tuple[Callable[[Session], Finding], Plant, str]] = [
    (check_collectives, wrong_all_to_all, "all-to-all of torch.float32"),
    (check_grouped_mm, wrong_last_expert, "fp32 rows 16 0 5 43: output/rows"),
    (check_packed_attention, attention_across_segments, "fp32 segments 1 20 7 36: output"),
    (check_layer, images_as_text, "image fp32 moiie: output/hidden"),
    (check_model, attention_across_segments, "packed fp32"),
    (check_model, half_balance_loss, "padded fp32: grad/"),
]


@pytest.mark.parametrize(
    ("check", "plant", "said"),
    FAULTS,
    ids=[f"{check.__name__}-{plant.__name__}" for check, plant, _ in FAULTS],
)
def test_fault_is_found(
    check: Callable[[Session], Finding],
    plant: Plant,
    said: str,
    given: Session,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = check(given)
    assert before.status == "PASS", before.reason
    plant(monkeypatch)
    after = check(given)
    assert after.status == "FAIL" and said in after.reason, after.reason


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda curve: curve["lm_loss"].append(1.001 * curve["lm_loss"].pop()), "fp32: loss"),
        (lambda curve: curve.update(samples="0" * 16), "samples"),
    ],
    ids=["another loss", "other samples"],
)
def test_another_loss_curve(
    change: Callable[[dict[str, Any]], None],
    said: str,
    given: Session,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    curve = json.loads(training.CURVE.read_text())
    change(curve)
    file = tmp_path / "curve.json"
    file.write_text(json.dumps(curve))
    monkeypatch.setattr(training, "CURVE", file)
    found = training.check_loss_curve(given)
    assert found.status == "FAIL" and said in found.reason, found.reason


def test_the_curve_shows_training() -> None:
    """The comparison would hold for a run in which nothing happens."""
    curve = json.loads(training.CURVE.read_text())
    assert len(curve["lm_loss"]) == len(curve["grad_norm"]) == training.STEPS
    assert curve["lm_loss"][-1] < 0.5 * curve["lm_loss"][0]


def test_a_resume_that_repeats_samples(
    given: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = run.build_train_loader

    def build_train_loader(*rest: Any, **options: Any) -> Any:
        return original(*rest, **(options | {"consumed_samples": 0}))

    monkeypatch.setattr(run, "build_train_loader", build_train_loader)
    found = training.check_checkpoints(session(given.context, tmp_path))
    assert found.status == "FAIL" and "with resuming after step 1" in found.reason, found.reason
