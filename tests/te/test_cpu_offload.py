"""Optimizer states in host memory: updates, saves and resumes, with one kind of memory for both.

Megatron's hybrid optimizer asks tensors whether they are on a GPU.  Here the answer is yes for the
weights and no for the copies that it makes of them.
"""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path
from typing import Any

import pytest
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer, hybrid_optimizer

from moiie_megatron.checkpoint.parallel_io import write_in_turn
from moiie_megatron.checkpoint.progress import Progress
from moiie_megatron.checkpoint.save_load import load_checkpoint, request_save
from moiie_megatron.config.megatron_section.sections import OPTIMIZER
from moiie_megatron.mcore.parallel import ParallelContext, seed_everything
from moiie_megatron.training.state import TrainState, prepare_training
from moiie_megatron.training.step import train_step
from moiie_megatron.vlm.build import build_chunks
from tests.helpers.batches import image_batch, text_batch
from tests.helpers.megatron_cases import Case
from tests.helpers.training_cases import with_fields

OFFLOAD = {"optimizer_cpu_offload": True}
HALF = OFFLOAD | {"optimizer_offload_fraction": 0.5, "overlap_cpu_optimizer_d2h_h2d": True}


# What asks for a GPU in Megatron's hybrid optimizer, by method, and what stands for it here.
CHANGES = {
    "_get_sub_optimizer_param_groups": {
        " if param.is_cuda]": "]",
        " and param.is_cuda:": ":",
        "if param.is_cuda:": "if not cpu_copy:",
        ".pin_memory()": "",
    },
    "_move_new_state_to_right_device": {'.to("cuda")': '.to("cpu")'},
}


@pytest.fixture(autouse=True)
def one_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, changes in CHANGES.items():
        source = textwrap.dedent(inspect.getsource(getattr(HybridDeviceOptimizer, name)))
        for old, new in changes.items():
            assert source.count(old) == 1, old
            source = source.replace(old, new)
        namespace: dict[str, Any] = {}
        exec(compile(source, name, "exec"), vars(hybrid_optimizer) | {}, namespace)
        monkeypatch.setattr(HybridDeviceOptimizer, name, namespace[name])


def fresh(case: Case, te: ParallelContext, seed: int) -> TrainState:
    seed_everything(seed, te.groups)
    model = build_chunks(with_fields(OPTIMIZER, {}), te)  # the CPU may not offload
    return prepare_training(with_fields(OPTIMIZER, case), te, model, steps=5)


def losses(te: ParallelContext, state: TrainState, steps: int) -> list[float]:
    config, batches = with_fields(OPTIMIZER, {}), [image_batch(0), text_batch(1)]
    return [train_step(config, te, state, batches).lm_loss for _ in range(steps)]


@pytest.mark.parametrize("case", [OFFLOAD, HALF], ids=["all", "half"])
def test_updates_and_resumes(te: ParallelContext, case: Case, tmp_path: Path) -> None:
    """Before the first update and after one every bit of the state comes back.

    The optimizer on the CPU and the kernel for GPUs may round differently.
    """
    case = case | {"pin_cpu_grads": False}  # needs a GPU
    want = losses(te, fresh(case, te, seed=1), 3)
    assert len(set(want)) == 3
    assert want == pytest.approx(losses(te, fresh({}, te, seed=1), 3), rel=1e-6)
    for updates in (0, 1):
        state = fresh(case, te, seed=1)
        assert all(isinstance(p.optimizer, HybridDeviceOptimizer) for p in parts_of(state))
        assert losses(te, state, updates) == want[:updates]
        progress = Progress(step=updates, consumed_samples=0)
        folder = tmp_path / str(updates)
        write_in_turn(request_save(folder, te, state.state_parts(), progress)).execute_sync()
        for reader in (case, {}):
            resumed = fresh(reader, te, seed=2)
            load_checkpoint(folder, te, resumed.state_parts())
            expected = want[updates : updates + 2]
            same = expected if reader else pytest.approx(expected, rel=1e-6)
            assert losses(te, resumed, 2) == same


def parts_of(state: TrainState) -> list[Any]:
    return list(state.optimizer.chained_optimizers)
