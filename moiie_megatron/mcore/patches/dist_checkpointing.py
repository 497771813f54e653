"""What Megatron-Core needs to save and load checkpoints in every situation of ours."""

from __future__ import annotations

import pickle
import queue
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async

_IDLE: Final = "idle"


class _ResultsFile:
    """A queue of one value through a file without a name, which a forked process shares.

    Megatron's writers report what they wrote where to the process that trains.  Megatron itself
    starts a ``multiprocessing`` manager for that: it costs seconds on the first save and, when
    the run is killed, lives on and keeps the run's output open (a pipe behind torchrun would
    never end).  A pipe would block writers of many tensors until somebody reads.
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
    """Let Megatron-Core's writers report through a file (``_ResultsFile``), not a manager.

    One save at a time may be under way.  Repeated calls change nothing.
    """
    # None until the first save; versions without this name start no manager.
    if getattr(filesystem_async, "_results_queue", queue) is None:
        filesystem_async._results_queue = _ResultsFile()


@contextmanager
def add_dummy_step_state(optimizer: Any, step: int) -> Iterator[None]:
    """Within it, optimizers without any parameter can be saved and loaded like the others.

    Megatron's distributed optimizer reads the number of steps from the state of a parameter and
    asserts that there is one.  A pipeline stage in which everything is frozen has none (stage 1
    trains the connector, which lives on the first stage); here it gets an entry without a
    parameter.  Transformer Engine's optimizer keeps the steps elsewhere and ignores it.

    Args:
        optimizer: Megatron's optimizer, chained or not.
        step: Steps that the optimizer has made.
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
    """Within it, a checkpoint can be loaded into a fresh distributed optimizer on torch's AdamW.

    Megatron-Core 0.16 trips there three times: it asserts that a fresh optimizer has state, it
    looks for a ``step`` among the loaded tensors (which it left out itself), and it gives all
    parameters one and the same ``step`` tensor, which every update then advances once per
    parameter.  Transformer Engine's optimizer keeps the steps elsewhere; nothing changes for it.
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
    group, place = part.model_param_group_index_map[model_param]
    state = part.optimizer.state[part.optimizer.param_groups[group]["params"][place]]
    own = {"step": state["step"]} if "step" in state else {}
    type(part)._set_main_param_and_optimizer_states(part, model_param, {**own, **tensors})
