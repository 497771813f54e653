"""Fields of ``optimizer.megatron`` with Transformer Engine's Adam: updates, saves and resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moiie_megatron.checkpoint.parallel_io import write_in_turn
from moiie_megatron.checkpoint.progress import Progress
from moiie_megatron.checkpoint.save_load import load_checkpoint, request_save
from moiie_megatron.config.megatron_section.sections import OPTIMIZER
from moiie_megatron.mcore.parallel import ParallelContext, seed_everything
from moiie_megatron.training.state import TrainState, prepare_training
from moiie_megatron.training.step import train_step
from moiie_megatron.vlm.build import build_chunks
from tests.helpers.batches import image_batch, text_batch
from tests.helpers.megatron_cases import Case, name_of
from tests.helpers.training_cases import OPTIMIZER_CASES, take_steps, with_fields


@pytest.fixture(scope="module")
def plain(te: ParallelContext) -> dict[str, Tensor]:
    return take_steps(with_fields(OPTIMIZER, {}), te)


@pytest.mark.parametrize("case", OPTIMIZER_CASES, ids=name_of)
def test_fields_that_may_be_set(te: ParallelContext, plain: dict[str, Tensor], case: Case) -> None:
    """Two updates at a rate of 1e-3 change a weight by 2e-3 at most."""
    found = take_steps(with_fields(OPTIMIZER, case), te)
    weights = [name for name in plain if name.startswith("weight/")]
    differences = [float((found[name] - plain[name]).abs().max()) for name in weights]
    is_same = OPTIMIZER.allowed[next(iter(case))].losses != "different"
    assert max(differences) == 0.0 if is_same else 0.0 < max(differences) < 5e-3


def fresh(case: Case, te: ParallelContext, seed: int) -> TrainState:
    config = with_fields(OPTIMIZER, case)
    seed_everything(seed, te.groups)
    return prepare_training(config, te, build_chunks(config, te), steps=4)


def steps(case: Case, te: ParallelContext, state: TrainState, number: int) -> list[float]:
    config = with_fields(OPTIMIZER, case)
    batches = [image_batch(0), text_batch(1)]
    return [train_step(config, te, state, batches).lm_loss for _ in range(number)]


def save(folder: Path, te: ParallelContext, state: TrainState, updates: int) -> Path:
    progress = Progress(step=updates, consumed_samples=0)
    write_in_turn(request_save(folder, te, state.state_parts(), progress)).execute_sync()
    return folder


AWARE = {"use_precision_aware_optimizer": True}
NARROW = {"main_params_dtype": "fp16", "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}


@pytest.mark.parametrize("case", [AWARE, AWARE | NARROW], ids=["fp32", "narrow"])
def test_resume(te: ParallelContext, case: Case, tmp_path: Path) -> None:
    """Before the first update and after one, every bit of the state comes back."""
    for updates in (0, 1):
        state = fresh(case, te, seed=1)
        steps(case, te, state, updates)
        saved = save(tmp_path / str(updates), te, state, updates)
        resumed = fresh(case, te, seed=2)
        load_checkpoint(saved, te, resumed.state_parts())
        assert steps(case, te, resumed, 2) == steps(case, te, state, 2)


def test_another_dtype_reads_it(te: ParallelContext, tmp_path: Path) -> None:
    """Checkpoints hold fp32 weights and moments, whatever the optimizer keeps."""
    case = {**AWARE, "exp_avg_dtype": "bf16"}
    state = fresh(case, te, seed=1)
    steps(case, te, state, 1)
    saved = save(tmp_path / "step", te, state, 1)
    plain = fresh({}, te, seed=2)
    load_checkpoint(saved, te, plain.state_parts())
    for part, other in zip(
        plain.optimizer.chained_optimizers, state.optimizer.chained_optimizers, strict=True
    ):
        moments = [values["exp_avg"] for values in part.optimizer.state.values()]
        theirs = [values["exp_avg"] for values in other.optimizer.state.values()]
        assert {m.dtype for m in moments} == {torch.float32}
        assert {m.dtype for m in theirs} == {torch.bfloat16}
        for one, two in zip(moments, theirs, strict=True):
            assert torch.equal(one, two.float())
    assert steps({}, te, plain, 1) == pytest.approx(steps(case, te, state, 1), rel=1e-3)
