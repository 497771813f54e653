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
from pathlib import Path
from typing import Any, Final

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.optimizer import distrib_optimizer, optimizer

from moiie_megatron.mcore.patches.patch import Patch

COMMON_FILE: Final = "common.pt"
_IDLE: Final = "idle"
_RATES: Final = ("max_lr", "min_lr")


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
def add_dummy_step_state(chained: Any, step: int) -> Iterator[None]:
    """Give optimizers without parameters a step count, so that they can be saved.

    A pipeline stage in which everything is frozen has such an optimizer (stage 1 trains the
    connector, which lives on the first stage).  Transformer Engine's optimizer keeps the step
    count elsewhere and ignores the entry.

    Args:
        chained: Megatron's optimizer, chained or not.
        step: Number of updates so far.
    """
    idle = [
        inner
        for part in getattr(chained, "chained_optimizers", [chained])
        if (inner := part.optimizer) is not None
        and not any(group["params"] for group in inner.param_groups)
    ]
    for inner in idle:
        inner.state[_IDLE] = {"step": torch.tensor(float(step))}
    try:
        yield
    finally:
        remove_dummy_step_state(chained)


def remove_dummy_step_state(chained: Any) -> None:
    """Undo ``add_dummy_step_state``, also where it has come from a checkpoint.

    The number of steps of rank 0 is read by all ranks, and its optimizer may have been the one
    without parameters.

    Args:
        chained: Megatron's optimizer, chained or not.
    """
    for part in getattr(chained, "chained_optimizers", [chained]):
        if part.optimizer is not None:
            part.optimizer.state.pop(_IDLE, None)


def distinguish_parameter_groups() -> None:
    """Let Megatron-Core tell parameter groups apart that differ in their learning rates.

    Repeated calls change nothing.
    """
    for module in (optimizer, distrib_optimizer):
        keys = module.param_group_identifier_keys
        added = tuple(key for key in _RATES if key not in keys)
        module.param_group_identifier_keys = (*keys, *added)


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
        targets=(f"{_OPTIMIZER}.state_dict",),
        reason="It reads the number of steps from the state of a parameter and asserts that there "
        "is exactly one; a stage in which everything is frozen has none.",
    ),
    Patch(
        name="parameter groups",
        targets=tuple(
            f"megatron.core.optimizer.{module}.param_group_identifier_keys"
            for module in ("optimizer", "distrib_optimizer")
        ),
        reason="Groups are looked up in a checkpoint by keys without the learning rate: parts of "
        "the model with rates of their own get the rate of one of them, or loading fails.",
        versions=("0.16",),
    ),
)
