"""Saves a run, at once or in the background; only complete checkpoints get their name.

Both ways are one request of Megatron-Core: what to write, and what all ranks do once every rank
has written.  In the background every rank forks a process that writes its state as it was at the
fork (GPU tensors are copied to the host before), and training goes on.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException

from moiie_megatron.checkpoint.directory import CONFIG_FILE, copy_tokenizer, step_directory
from moiie_megatron.checkpoint.finalize import finalize, unfinished_directory
from moiie_megatron.checkpoint.parallel_io import with_digests, write_in_turn
from moiie_megatron.checkpoint.progress import Progress
from moiie_megatron.checkpoint.save_load import request_save
from moiie_megatron.config.load import dump_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.utils.errors import UserError


class CheckpointSaver:
    """The saves of a run; every rank makes the same calls.

    Args:
        parts: What ``request_save`` takes.
        report: Called with every complete checkpoint and the seconds since its save began.
        newest: The checkpoint that the run goes on from, if any.

    Attributes:
        newest: The last complete checkpoint.

    All methods raise UserError, on all ranks, if a save has failed.
    """

    def __init__(
        self,
        config: RunConfig,
        context: ParallelContext,
        parts: dict[str, Any],
        report: Callable[[Path, float], None],
        newest: Path | None,
    ) -> None:
        self.newest = newest
        self._config = config
        self._context = context
        self._parts = parts
        self._report = report
        self._pending = AsyncCallsQueue()
        self._final: Path | None = None  # of the save that has been begun last

    def save(self, progress: Progress) -> None:
        """Save; with ``checkpoint.asynchronous`` return as soon as the state is copied."""
        self.drain()
        started = time.monotonic()
        self._final = final = step_directory(self._config.output, progress.step)
        with self._failures(final):
            request = request_save(
                unfinished_directory(final), self._context, self._parts, progress
            )
            request.add_finalize_fn(partial(self._finish, final, started))
            if self._config.checkpoint.asynchronous:
                self._pending.schedule_async_request(with_digests(request))
            else:
                with_digests(write_in_turn(request)).execute_sync()

    def poll(self) -> None:
        """Finish a save whose writers are done on all ranks.

        Costs one small reduction while there is a save in the background, else nothing.
        """
        self._finalize(blocking=False)

    def drain(self) -> None:
        """Wait for the save in the background, and finish it."""
        self._finalize(blocking=True)

    def _finalize(self, *, blocking: bool) -> None:
        if self._pending.get_num_unfinalized_calls():
            with self._failures(Path(self._config.output)):
                self._pending.maybe_finalize_async_calls(blocking=blocking)

    def _finish(self, final: Path, started: float) -> None:
        config = self._config
        if self._context.rank == 0:
            unfinished = unfinished_directory(final)
            (unfinished / CONFIG_FILE).write_text(dump_config(config))
            copy_tokenizer(Path(config.data.tokenizer), unfinished)
            finalize(final, keep=config.checkpoint.keep)
        dist.barrier()
        self.newest = final
        self._report(final, time.monotonic() - started)

    @contextmanager
    def _failures(self, path: Path) -> Iterator[None]:
        """Turn errors of a save into a UserError on all ranks; Megatron tells only rank 0 why."""
        try:
            yield
        except OSError as error:  # rank 0 alone, while it completes the folder
            self._remove_unfinished()
            raise UserError(_failed(path, str(error))) from error
        except CheckpointException as error:
            reason = [next((str(cause) for cause, _ in error.failures.values()), "")]
            dist.broadcast_object_list(reason, src=0)
            self._remove_unfinished()
            raise UserError(_failed(path, reason[0])) from error

    def _remove_unfinished(self) -> None:
        """Make room again; no rank is writing any more."""
        if self._context.rank == 0 and self._final is not None:
            shutil.rmtree(unfinished_directory(self._final), ignore_errors=True)


def _failed(path: Path, reason: str) -> str:
    return (
        f"The checkpoint {path} could not be written ({reason.rstrip('.')}): make room there "
        "and start again, the run goes on from the checkpoint before."
    )
