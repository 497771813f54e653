"""The configuration of a checkpoint for programs that do not train."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from moiie_megatron.checkpoint.directory import CONFIG_FILE
from moiie_megatron.config.load import load_saved_config
from moiie_megatron.config.schema import RunConfig

_OF_TRAINING: Final = ("parallel={}", "megatron={}", "ddp={}", "optimizer.megatron={}")


def checkpoint_config(directory: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration stored in a checkpoint, with the checkpoint's own tokenizer.

    All parallel degrees are 1 unless ``overrides`` set them (``parallel.expert=2``), whatever the
    degrees of the run that wrote the checkpoint.  What that run has set of Megatron-Core's fields
    concerns training, or kernels that this machine may not have, and is left out.

    Raises:
        UserError: The configuration is broken, or an override is wrong.
    """
    config = load_saved_config(directory / CONFIG_FILE, [*_OF_TRAINING, *overrides])
    return config.model_copy(
        update={"data": config.data.model_copy(update={"tokenizer": str(directory)})}
    )
