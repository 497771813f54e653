"""Named numbers by step, for TensorBoard and optionally Weights & Biases."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.training.logging.jsonl import LostFn, lost_sentence, refuse
from moiie_megatron.utils.errors import UserError

_LATE_STEP = "evaluation/step"


class _Guarded:
    """TensorBoard's writer of records; what it cannot write is told once, and dropped."""

    def __init__(self, writer: Any, directory: Path, lost: LostFn) -> None:
        self._writer, self._directory, self._lost = writer, directory, lost

    def write(self, data: bytes) -> None:
        self._try(self._writer.write, data)

    def flush(self) -> None:
        self._try(self._writer.flush)

    def close(self) -> None:
        self._try(self._writer.close)

    def _try(self, call: Callable[..., Any], *words: Any) -> None:
        try:
            call(*words)
        except OSError as error:
            self._lost(lost_sentence(self._directory, error))


class Scalars:
    """Writes ``tensorboard/`` in the output directory, and reports to ``log.wandb_project``.

    Only rank 0 makes one.

    Args:
        start_step: Values of later steps, from before the run was interrupted, are purged.
        lost: Told, by a thread, when TensorBoard's file cannot be written.

    Raises:
        UserError: TensorBoard's file cannot be made.
    """

    def __init__(self, config: RunConfig, start_step: int, lost: LostFn = refuse) -> None:
        directory = Path(config.output) / "tensorboard"
        try:
            self.board = SummaryWriter(str(directory), purge_step=start_step + 1)
        except OSError as error:
            raise UserError(lost_sentence(directory, error)) from error
        # Its thread would print a traceback, and end.
        queue = self.board._get_file_writer().event_writer._async_writer
        queue._writer = queue._worker._record_writer = _Guarded(queue._writer, directory, lost)
        self._step: int | None = None  # of the last values
        self.wandb_run: Any = None
        if config.log.wandb_project is not None:
            import wandb

            # One run per output directory, also when it resumes from a checkpoint.
            output = Path(config.output).absolute()
            self.wandb_run = wandb.init(
                project=config.log.wandb_project,
                id=hashlib.sha256(str(output).encode()).hexdigest()[:16],
                name=output.name,
                resume="allow",
                dir=config.output,
                config=config.model_dump(),
            )
            # Results come after later steps, which wandb.log would refuse.
            self.wandb_run.define_metric("evaluation/*", step_metric=_LATE_STEP)

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Log the values of one step."""
        self._step = step
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        if self.wandb_run is not None:
            self.wandb_run.log(dict(values), step=step)

    def add_late(self, values: Mapping[str, float], step: int) -> None:
        """Log values of a step before the present one."""
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        if self.wandb_run is not None and self._step is not None:
            self.wandb_run.log({**values, _LATE_STEP: step}, step=self._step)

    def close(self) -> None:
        """Flush and close."""
        self.board.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()
