"""All ranks take part in writing and reading a checkpoint, with little memory on the host.

Replicated weights are divided among the ranks that hold them by Megatron-Core's fully parallel
strategies; every rank writes and reads its own optimizer state (``optimizer_shards.py``).
"""

from __future__ import annotations

import gc
import queue
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from torch import Tensor

from moiie_megatron.checkpoint.manifest import note_digests
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.mcore.patches.dist_checkpointing import plan_save

FILES_PER_RANK: Final = 2


def begin_save(state: dict[str, Any], directory: Path, metadata: dict[str, Any]) -> AsyncRequest:
    """Plan a save and return its request; every rank calls this.

    Args:
        state: Nothing in it is copied yet, but for views of tensors on the CPU.
        metadata: Says what the checkpoint holds; stored with it.
    """
    # Tensor-parallel ranks replicate the vision encoder: any rank may write any replica.
    strategy = FullyParallelSaveStrategyWrapper(
        TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=FILES_PER_RANK)
    )
    return plan_save(state, directory, metadata, strategy)


def write_in_turn(request: AsyncRequest) -> AsyncRequest:
    """A request whose tensors are copied to the host one by one while they are written.

    Only for ``execute_sync``: Megatron-Core's own copies all before it starts to write, since it
    writes in processes that cannot use the GPU.
    """
    if request.async_fn is None:  # nothing to write on this rank
        return request
    # Its arguments so far are those of write_preloaded_data in front of the file's number.
    transforms = request.async_fn.args[0]
    return request._replace(async_fn=partial(_write_files, transforms), preload_fn=None)


def with_digests(request: AsyncRequest) -> AsyncRequest:
    """A request whose writers also note the digests of large files for the manifest.

    They have just written them: nothing is read from the disk, and a save in the background does
    not keep the training waiting.
    """
    if request.async_fn is None:
        return request
    return request._replace(async_fn=partial(_write_with_digests, request.async_fn))


def _write_with_digests(write: Any, rank: int, files: list[Any], results: Any) -> None:
    write(rank, files, results)
    # In a forked process a collection would free the parent's tensors on the GPU.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        note_digests(path for path, *_ in files)
    finally:
        if was_enabled:
            gc.enable()


def _write_files(transforms: list[Any], _rank: int, files: list[Any], results: Any) -> None:
    """Write the files of this rank and report where every tensor went, or the first error."""
    written: dict[int, Any] = {}
    for number, (path, key, (objects, tensors)) in enumerate(files):
        done: queue.Queue[Any] = queue.Queue()
        running: queue.Queue[int] = queue.Queue()
        running.put(number)
        file = (path, key, (objects, _OneByOne(tensors)))
        FileSystemWriterAsync.write_preloaded_data(
            transforms, number, file, done, running, use_fsync=True
        )
        _, outcome = done.get()
        if isinstance(outcome, Exception):
            results.put(outcome)
            return
        written[number] = outcome
    results.put(written)


@dataclass(frozen=True)
class _OneByOne:
    """Tensors of one file with what to write of them, each copied to the host when asked for."""

    tensors: list[tuple[Any, Tensor]]

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        for item, tensor in self.tensors:
            yield item, tensor.cpu()


def load_strategy(context: ParallelContext) -> Any:
    """Of the ranks that hold the same tensors each reads some, and sends them to the others."""
    return FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), context.groups.dp_cp)
