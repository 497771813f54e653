"""What Megatron-Core needs to save and load checkpoints in every situation of ours."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async

_IDLE: Final = "idle"


def write_without_manager() -> None:
    """Let Megatron-Core's writer report its results through a queue inside this process.

    For asynchronous saves Megatron starts a ``multiprocessing`` manager on the first save.  Ours
    are synchronous, so writer and reader of that queue are one process; the manager would cost
    seconds to start and, when the run is killed, live on and keep its output open (a pipe behind
    torchrun would never end).  Repeated calls change nothing.
    """
    # None until the first save; versions without this name start no manager.
    if getattr(filesystem_async, "_results_queue", queue) is None:
        filesystem_async._results_queue = queue.Queue()


@contextmanager
def idle_optimizers_have_a_step(optimizer: Any, step: int) -> Iterator[None]:
    """Within it, optimizers without any parameter can be saved and loaded like the others.

    Megatron's distributed optimizer reads the number of steps from the state of a parameter and
    asserts that there is one.  A pipeline stage in which everything is frozen has none (stage 1
    trains the connector, which lives on the first stage); here it gets an entry without a
    parameter.  Transformer Engine's optimizer keeps the steps elsewhere and ignores it.

    Args:
        optimizer: Megatron's optimizer, chained or not.
        step: Steps done so far.
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


def allocate_state(optimizer: Any) -> None:
    """Give a fresh optimizer its state, so that a checkpoint can be loaded into it.

    Megatron's distributed optimizer on torch's AdamW asserts while it describes its state that
    there is some.  The values (and the one step that they count) are replaced by the load.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        if inner is not None and not inner.state and hasattr(part, "gbuf_ranges"):
            part._init_optimizer_states_with_dummy_values()
