"""Named numbers by step, for TensorBoard and optionally Weights & Biases."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from moiie_megatron.config.schema import RunConfig


class Scalars:
    """Writes ``tensorboard/`` in the output directory, and reports to ``log.wandb_project``.

    Only rank 0 makes one.

    Args:
        start_step: Values of later steps, from before the run was interrupted, are purged.
    """

    def __init__(self, config: RunConfig, start_step: int) -> None:
        directory = str(Path(config.output) / "tensorboard")
        self.board = SummaryWriter(directory, purge_step=start_step + 1)
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

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Log the values of one step."""
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        if self.wandb_run is not None:
            self.wandb_run.log(dict(values), step=step)

    def close(self) -> None:
        """Flush and close."""
        self.board.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()
