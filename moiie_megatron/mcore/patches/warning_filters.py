"""Silences warnings of Megatron-Core that are wrong or expected in this project."""

from __future__ import annotations

import logging
import warnings

# Logger, and the start of the message that it is not to print.
_EXPECTED = (
    # MoIIELayer is a MoELayer; it gets its process groups from its own specification.
    ("megatron.core.transformer.transformer_layer", "Unknown MLP type"),
    # On the CPU the tracker's generator *is* the CPU generator.
    ("megatron.core.tensor_parallel.random", "CPU RNG state changed"),
)

_EXPECTED_WARNINGS = (
    # Neither is needed on the CPU; on GPUs the container brings both.
    ".*Apex (is|are) not installed.*",
    ".*full scope is deprecated.*",  # a default of Megatron's own configuration
    ".*grad attribute of a Tensor that is not a leaf.*",  # slices of the distributed optimizer
    ".*torch.distributed.* is deprecated.*",  # newer names, called inside Megatron-Core
    ".*load_state_dict.* is deprecated.*",  # the same, in its distributed checkpoints
    ".*deprecating ShardedTensor.*",
)


class _StartsWith(logging.Filter):
    def __init__(self, start: str) -> None:
        super().__init__()
        self.start = start

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.start)


def filter_megatron_warnings() -> None:
    """Install the filters; repeated calls add nothing."""
    for name, start in _EXPECTED:
        logger = logging.getLogger(name)
        if not any(isinstance(f, _StartsWith) for f in logger.filters):
            logger.addFilter(_StartsWith(start))
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
