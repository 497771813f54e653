"""What the operator of a program is told: the package's log on standard output."""

from __future__ import annotations

import logging

from moiie_megatron.cli.output import silence_output

PACKAGE = "moiie_megatron"


class _StandardOutput(logging.Handler):
    """Writes to ``sys.stdout`` as it is at the time, one line at once."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        try:
            print(prefix + record.getMessage(), flush=True)
        except OSError:  # its reader has gone, or the disk is full: the work goes on
            silence_output()


def configure_logging(rank: int) -> None:
    """Print the package's log, from INFO upwards, on rank 0; other ranks print nothing."""
    logger = logging.getLogger(PACKAGE)
    logger.handlers = [_StandardOutput() if rank == 0 else logging.NullHandler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False
