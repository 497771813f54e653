"""Numbers by name and step for TensorBoard and, where a project is named, Weights & Biases."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.layout.token_types import MODALITIES


class Scalars:
    """Writes ``tensorboard/`` in the output folder; rank 0 alone makes one.

    Args:
        start_step: What an earlier process logged after this step is void.
    """

    def __init__(self, config: RunConfig, start_step: int) -> None:
        folder = str(Path(config.output) / "tensorboard")
        self.board = SummaryWriter(folder, purge_step=start_step + 1)
        self.wandb_run: Any = None
        if config.log.wandb_project is not None:
            import wandb

            # One run per output folder, also when it goes on from a checkpoint.
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
        """Report values of one step."""
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        if self.wandb_run is not None:
            self.wandb_run.log(dict(values), step=step)

    def close(self) -> None:
        """Flush and close."""
        self.board.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()


def routing_scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a routing record that are worth a curve, by name."""
    return dict(_routing_scalars(record))


def _routing_scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    experts = record["experts"]
    for number, layer in record["layers"].items():
        place = f"layer_{int(number):02d}"
        for modality in MODALITIES:
            part = layer[modality]
            if not part["tokens"]:
                continue
            yield f"load_entropy_{modality}/{place}", part["entropy"]
            for name, share in zip(experts, part["share"], strict=True):
                if name.split(".")[0] in (modality, "shared"):
                    yield f"expert_fraction_{modality}/{place}/{name}", share
        if layer["max_over_mean"] is not None:
            yield f"rank_load_max_over_mean/{place}", layer["max_over_mean"]
        yield f"dead_experts/{place}", len(layer["dead"])
    for kind, moved in record["moved"].items():
        yield f"dispatched_bytes/{kind}", moved["bytes"]
