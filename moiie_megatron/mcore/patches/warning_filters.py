"""Warnings and log records of Megatron-Core that are wrong or expected in this project."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import Final

from moiie_megatron.mcore.patches.patch import EXAMINED, Patch


@dataclass(frozen=True)
class ExpectedLog:
    """A log record that is not printed: the logger and the start of the message.

    Attributes:
        logger: The name of Megatron's module.
        versions: Minor versions of Megatron-Core that log it.
    """

    logger: str
    start: str
    versions: tuple[str, ...] = EXAMINED


EXPECTED_LOGS: Final = (
    # MoIIELayer is a MoELayer; its specification passes the process groups.
    ExpectedLog(
        "megatron.core.transformer.transformer_layer", "Unknown MLP type", ("0.16", "0.17")
    ),
    # On the CPU the tracker's generator is the CPU generator.
    ExpectedLog("megatron.core.tensor_parallel.random", "CPU RNG state changed"),
    # docs/megatron-core.md says what the project would do without them.
    ExpectedLog("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED", ("0.19",)),
    ExpectedLog(
        "megatron.core.dist_checkpointing.strategies.common",
        "load_common is deprecated",
        ("0.19",),
    ),
    ExpectedLog(
        "megatron.core.dist_checkpointing.strategies.torch",
        "MCore's async save is deprecated",
        ("0.17", "0.18", "0.19"),
    ),
    # It computes the layout itself.
    ExpectedLog(
        "megatron.core.distributed.distributed_data_parallel",
        "DistributedDataParallel: full_param_layout not provided",
        ("0.18", "0.19"),
    ),
)

EXPECTED_WARNINGS: Final = (
    # Neither is needed on the CPU; on GPUs the container brings both.
    ".*Apex (is|are) not installed.*",
    ".*full scope is deprecated.*",  # a default of Megatron's own configuration
    ".*grad attribute of a Tensor that is not a leaf.*",  # slices of the distributed optimizer
    ".*torch.distributed.* is deprecated.*",  # newer names, called inside Megatron-Core
    ".*load_state_dict.* is deprecated.*",  # the same, in its distributed checkpoints
    ".*deprecating ShardedTensor.*",
    ".*argument order of load has been changed.*",  # the same
    ".*assuming the intent is to load in a single process.*",  # every rank reads by itself
    ".*is experimental and still under active development.*",  # models that are not used
)


class _StartFilter(logging.Filter):
    def __init__(self, start: str) -> None:
        super().__init__()
        self.start = start

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.start)


def filter_megatron_warnings() -> None:
    """Install the filters for this process; repeated calls add nothing."""
    for expected in EXPECTED_LOGS:
        logger = logging.getLogger(expected.logger)
        if not any(isinstance(f, _StartFilter) for f in logger.filters):
            logger.addFilter(_StartFilter(expected.start))
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


PATCHES: Final = (
    Patch(
        name="expected logs",
        targets=tuple(log.logger for log in EXPECTED_LOGS),
        reason="Wrong for this project (MoIIELayer gets its process groups) or on the CPU (one "
        "generator serves both), or what a user cannot act on; some are printed for every layer.",
    ),
    Patch(
        name="expected warnings",
        targets=("warnings.filterwarnings",),
        reason="Deprecations inside Megatron-Core that a user cannot act on.",
        need_not_shown="Most come from torch, at calls inside Megatron-Core that need a run.",
    ),
)
