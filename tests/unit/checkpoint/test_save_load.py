"""One process saves a tiny training state and loads it into a fresh one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject

from moiie_megatron.checkpoint.save_load import load_checkpoint
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.training.state import TrainState
from tests.helpers.tiny_run import tiny_values
from tests.helpers.train_states import RATES, make_config, make_state, save, update


def settings(state: TrainState) -> list[dict[str, Any]]:
    without = ("params", "step")
    return [
        {key: value for key, value in group.items() if key not in without}
        for part in state.optimizer.chained_optimizers
        for group in part.optimizer.param_groups
    ]


@pytest.mark.parametrize("distributed", [True, False])
def test_training_goes_on_bit_for_bit(
    distributed: bool, tmp_path: Path, context: ParallelContext
) -> None:
    """With learning rates that differ from part to part, and the same number of steps."""
    config = make_config(tmp_path, optimizer={"distributed": distributed})
    whole = make_state(config, context, 1)
    update(whole)
    update(whole)
    checkpoint = save(tmp_path / "step", context, whole, 2)
    resumed = make_state(config, context, 2)
    load_checkpoint(checkpoint, context, resumed.state_parts())
    assert len({group["max_lr"] for group in settings(resumed)}) == len(RATES)
    assert settings(resumed) == settings(whole)
    for state in (whole, resumed):
        update(state)
    theirs = dict(whole.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, theirs[name]), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("distributed", [True, False])
def test_saved_before_the_first_update(
    distributed: bool, precision: str, tmp_path: Path, context: ParallelContext
) -> None:
    """All steps so far were skipped: no moments yet, here and in what resumes."""
    values = tiny_values(tmp_path, tmp_path)["train"] | {"precision": precision}
    config = make_config(tmp_path, optimizer={"distributed": distributed}, train=values)
    whole = make_state(config, context, 1)
    never_saved = make_state(config, context, 1)
    checkpoint = save(tmp_path / "step", context, whole, 3, skipped_steps=3)
    resumed = make_state(config, context, 2)
    load_checkpoint(checkpoint, context, resumed.state_parts())
    assert settings(resumed) == settings(whole) == settings(never_saved)
    for state in (never_saved, whole, resumed):
        update(state)
        update(state)
    expected = dict(never_saved.model.named_parameters())
    for state in (whole, resumed):
        for name, parameter in state.model.named_parameters():
            assert torch.equal(parameter, expected[name]), name


def test_steps_of_a_rank_without_experts(tmp_path: Path, context: ParallelContext) -> None:
    """Rank 0 has saved that its optimizer of experts has nothing; another rank has experts."""
    config = make_config(tmp_path, optimizer={"distributed": False})
    first = make_state(config, context, 1)
    update(first)
    experts = first.optimizer.chained_optimizers[-1].optimizer
    experts.state["idle"] = {"step": torch.tensor(1.0)}
    checkpoint = save(tmp_path / "first", context, first, 1)
    resumed = make_state(config, context, 2)
    load_checkpoint(checkpoint, context, resumed.state_parts())
    update(resumed)
    again = make_state(config, context, 3)
    load_checkpoint(save(tmp_path / "second", context, resumed, 2), context, again.state_parts())
    for part in again.optimizer.chained_optimizers:
        assert {int(values["step"]) for values in part.optimizer.state.values()} == {2}


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, context: ParallelContext
) -> tuple[TrainState, Path]:
    """A state after one update, and its checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    state = make_state(make_config(folder), context, 1)
    update(state)
    return state, save(folder / "step", context, state, 1)


def test_objects_that_a_checkpoint_lacks_stay(
    trained: tuple[TrainState, Path],
    tmp_path: Path,
    context: ParallelContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Modules of Transformer Engine have an extra state that local modules do not write."""
    state = make_state(make_config(tmp_path), context, 2)
    model, loaded = state.model, {}
    sharded_state_dict = model.sharded_state_dict
    extra = torch.tensor([1, 2], dtype=torch.uint8)

    def with_extra_state(**options: Any) -> Any:
        entry = ShardedObject("language_model.norm._extra_state", extra, (1,), (0,), (0, 0, 0))
        return sharded_state_dict(**options) | {"norm._extra_state": entry}

    monkeypatch.setattr(model, "sharded_state_dict", with_extra_state)
    monkeypatch.setattr(model, "load_state_dict", loaded.update)
    load_checkpoint(trained[1], context, state.state_parts())
    assert loaded["norm._extra_state"] is extra
    assert loaded.keys() == {*sharded_state_dict(), "norm._extra_state"}


def test_another_implementation_of_the_optimizer_goes_on(
    trained: tuple[TrainState, Path], tmp_path: Path, context: ParallelContext
) -> None:
    """Its parameter groups have other keys than those in the checkpoint."""
    before, checkpoint = trained
    state = make_state(make_config(tmp_path), context, 2)
    for part in state.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            del group["amsgrad"]
            group["bias_correction"] = True
    load_checkpoint(checkpoint, context, state.state_parts())
    for ours, theirs in zip(settings(state), settings(before), strict=True):
        assert ours.pop("bias_correction") is True
        assert ours | {"amsgrad": False} == theirs
    steps = [group["step"] for p in state.optimizer.chained_optimizers for group in p.param_groups]
    assert set(steps) == {1} and all(isinstance(step, int) for step in steps)
