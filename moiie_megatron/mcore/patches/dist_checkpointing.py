"""Saving and loading Megatron-Core's distributed checkpoints.

In a run that may be killed, with stages that train nothing, and with torch's AdamW.
"""

from __future__ import annotations

import inspect
import pickle
import queue
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from moiie_megatron.mcore.patches.patch import Patch

COMMON_FILE: Final = "common.pt"
_IDLE: Final = "idle"


class _ResultsFile:
    """A queue of one value in an unnamed file, which a forked process shares.

    Megatron's writers report to the training process which tensor they wrote where.  A pipe
    would block the writers of many tensors until somebody reads.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  kept for all saves

    def put(self, value: Any) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._file.write(pickle.dumps(value))

    def get_nowait(self) -> Any:
        """Take the value.

        Raises:
            queue.Empty: There is none, or its writer was killed.
        """
        self._file.seek(0)
        data = self._file.read()
        self._file.truncate(0)
        try:
            return pickle.loads(data)
        except (EOFError, pickle.UnpicklingError) as error:
            raise queue.Empty from error


def use_file_results_queue() -> None:
    """Let Megatron-Core's checkpoint writers report through a file, not through a manager process.

    One save at a time may be under way.  Repeated calls change nothing.
    """
    # None until the first save; versions without this name start no manager.
    if getattr(filesystem_async, "_results_queue", queue) is None:
        filesystem_async._results_queue = _ResultsFile()


def plan_save(
    state: dict[str, Any], directory: Path, metadata: dict[str, Any], strategy: Any = None
) -> AsyncRequest:
    """Plan a save and return its request; every rank calls this.

    The state that is not cut into shards is in ``common.pt``, which every version reads.  0.16 to
    0.18 write it, 0.19 writes an object among the shards instead, which earlier ones do not read.

    Args:
        directory: Exists and is empty.
        metadata: Says what the checkpoint holds; stored with it.
        strategy: How Megatron-Core writes the shards; None for its default.
    """
    use_file_results_queue()
    common: dict[str, Any] = {}

    def keep(found: dict[str, Any]) -> dict[str, Any]:
        common.update(found)
        return found

    options: dict[str, Any] = {}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        # The default is a package of its own with another kind of request.
        options["async_strategy"] = "mcore"
    request = dist_checkpointing.save(
        state,
        str(directory),
        strategy,
        async_sharded_save=True,
        preprocess_common_before_consistancy_check=keep,
        content_metadata=metadata,
        **options,
    )
    assert request is not None
    if torch.distributed.get_rank() == 0 and not (directory / COMMON_FILE).exists():
        torch.save(common, directory / COMMON_FILE)
    return request


@contextmanager
def add_dummy_step_state(optimizer: Any, step: int) -> Iterator[None]:
    """Give optimizers without parameters a step count, so that they can be saved and loaded.

    A pipeline stage in which everything is frozen has such an optimizer (stage 1 trains the
    connector, which lives on the first stage).  Transformer Engine's optimizer keeps the step
    count elsewhere and ignores the entry.

    Args:
        optimizer: Megatron's optimizer, chained or not.
        step: Number of updates so far.
    """
    idle = [
        inner
        for part in getattr(optimizer, "chained_optimizers", [optimizer])
        if (inner := part.optimizer) is not None
        and not any(group["params"] for group in inner.param_groups)
    ]
    for inner in idle:
        inner.state[_IDLE] = {"step": torch.tensor(float(step))}
    try:
        yield
    finally:
        for inner in idle:
            inner.state.pop(_IDLE, None)


@contextmanager
def patch_optimizer_loading(optimizer: Any) -> Iterator[None]:
    """Allow loading a checkpoint into a fresh distributed optimizer on torch's AdamW.

    Initialises the optimizer's state, adds the ``step`` that the loaded tensors lack, and at the
    end gives every parameter a ``step`` tensor of its own.  Transformer Engine's optimizer keeps
    the step count elsewhere; nothing changes for it.
    """
    parts = [
        part
        for part in getattr(optimizer, "chained_optimizers", [optimizer])
        if hasattr(part, "gbuf_ranges") and part.optimizer is not None
    ]
    for part in parts:
        if not part.optimizer.state:
            part._init_optimizer_states_with_dummy_values()
        part._set_main_param_and_optimizer_states = partial(_set_with_step, part)
    try:
        yield
    finally:
        for part in parts:
            del part._set_main_param_and_optimizer_states
            for state in part.optimizer.state.values():
                if isinstance(state.get("step"), torch.Tensor):
                    state["step"] = state["step"].clone()


def _set_with_step(part: Any, model_param: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
    """Megatron's method of that name, with the step that ``load_state_dict`` has already set."""
    group, index = part.model_param_group_index_map[model_param]
    state = part.optimizer.state[part.optimizer.param_groups[group]["params"][index]]
    step = {"step": state["step"]} if "step" in state else {}
    type(part)._set_main_param_and_optimizer_states(part, model_param, {**step, **tensors})


_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
_SERIALIZATION = "megatron.core.dist_checkpointing.serialization"
PATCHES: Final = (
    Patch(
        name="common state",
        targets=(f"{_SERIALIZATION}.save", f"{_SERIALIZATION}.load_common_state_dict"),
        reason="0.19 writes no common.pt, which earlier versions cannot do without, but reads it. "
        "From 0.17 on saving needs the package nvidia-resiliency-ext unless told otherwise.",
        versions=("0.17", "0.18", "0.19"),
    ),
    Patch(
        name="results queue",
        targets=("megatron.core.dist_checkpointing.strategies.filesystem_async._results_queue",),
        reason="Megatron-Core starts a multiprocessing manager for it: that takes seconds on the "
        "first save, and when the run is killed the manager lives on and keeps the run's output "
        "open (a pipe behind torchrun would never end).",
    ),
    Patch(
        name="optimizer without parameters",
        targets=(f"{_OPTIMIZER}.state_dict", f"{_OPTIMIZER}.load_state_dict"),
        reason="Both read the number of steps from the state of a parameter and assert that there "
        "is exactly one; a stage in which everything is frozen has none.",
    ),
    Patch(
        name="optimizer loading",
        targets=(
            f"{_OPTIMIZER}._set_main_param_and_optimizer_states",
            f"{_OPTIMIZER}._init_optimizer_states_with_dummy_values",
        ),
        reason="With torch's AdamW loading fails three times: a fresh optimizer is asserted to "
        "have state, a step is looked up among the loaded tensors, where saving has left it out, "
        "and all parameters get one and the same step tensor, which every update then advances "
        "once per parameter.",
    ),
)
