"""The receipt of a conversion: what went in, what came out, and that it is what it should be.

Hashing and reading back run beside the writing (both let go of Python's lock), a few tensors
behind at most: those are held in memory.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from moiie_megatron import __version__
from moiie_megatron.checkpoint.directory import RECEIPT_FILE
from moiie_megatron.convert.dcp.writer import Place
from moiie_megatron.utils.digest import file_digest, same_bytes, tensor_digest
from moiie_megatron.utils.errors import UserError

_BEHIND = 3


class ConversionReport:
    """Collects what ``write`` puts into ``receipt.json``.

    Args:
        operation: Which conversion, and its options.
        sources: Files to hash, from the first moment on.
    """

    def __init__(self, operation: dict[str, Any], sources: Iterable[Path]) -> None:
        self._operation = operation
        # One thread for files, one for tensors: neither waits for the other.
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._files = ThreadPoolExecutor(max_workers=1)
        self._sources = {file: self._files.submit(file_digest, file) for file in sources}
        self._pending: deque[Future[None]] = deque()
        self._last: tuple[Tensor, str] | None = None
        self._tensors: dict[str, dict[str, Any]] = {}
        self._experts: dict[str, dict[str, bool]] = {}
        self._routers: dict[str, dict[str, float]] = {}

    def __enter__(self) -> ConversionReport:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pool in (self._pool, self._files):
            pool.shutdown(wait=True, cancel_futures=True)

    def add(self, name: str, tensor: Tensor, place: Place) -> None:
        """Note a tensor that was written whole."""
        self._submit(self._add, name, tensor, place)

    def add_router(self, name: str, tensor: Tensor, place: Place) -> None:
        """Note a router: its digest, mean and standard deviation."""
        values = tensor.float()
        self._routers[name] = {"mean": values.mean().item(), "std": values.std().item()}
        self.add(name, tensor, place)

    def add_expert(
        self,
        name: str,
        tensor: Tensor,
        place: Place,
        *,
        layer: int,
        expert: str,
        dense: Tensor | None,
    ) -> None:
        """Note one expert's part of a tensor and compare what was written with the dense FFN.

        Args:
            expert: The expert's name, ``vision.0``.
            dense: The dense FFN's tensor; None where the experts were pretrained.
        """
        self._submit(self._add_expert, name, tensor, place, layer, expert, dense)

    def write(self, folder: Path) -> None:
        """Wait for what is still being hashed and write the receipt.

        Raises:
            UserError: A source cannot be read any more, or what was written reads back wrong.
        """
        while self._pending:
            self._pending.popleft().result()
        content = {
            "tool": f"moiie-megatron {__version__}",
            **self._operation,
            "digests": {"sources": "sha256", "tensors": "crc32"},
            "sources": {
                str(file): {"bytes": file.stat().st_size, "digest": future.result()}
                for file, future in self._sources.items()
            },
            "experts_equal_dense_ffn": self._experts,
            "routers": self._routers,
            "tensors": self._tensors,
        }
        (folder / RECEIPT_FILE).write_text(json.dumps(content, indent=1) + "\n")

    def _submit(self, task: Any, *arguments: Any) -> None:
        if len(self._pending) >= _BEHIND:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(task, *arguments))

    def _add(self, name: str, tensor: Tensor, place: Place) -> None:
        _check(name, tensor, place.read(), place)
        self._tensors[name] = _entry(tensor) | {"digest": self._digest(tensor)}

    def _add_expert(
        self,
        name: str,
        tensor: Tensor,
        place: Place,
        layer: int,
        expert: str,
        dense: Tensor | None,
    ) -> None:
        stored = place.read()[0]
        _check(name, tensor, stored, place)
        entry = self._tensors.setdefault(name, _entry(tensor) | {"digests": {}})
        entry["digests"][expert] = self._digest(tensor)
        if dense is not None:
            same = tensor is dense or same_bytes(stored, dense)
            of_layer = self._experts.setdefault(str(layer), {})
            of_layer[expert] = of_layer.get(expert, True) and same

    def _digest(self, tensor: Tensor) -> str:
        if self._last is None or self._last[0] is not tensor:  # experts share their tensor
            self._last = (tensor, tensor_digest(tensor))
        return self._last[1]


def _entry(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def _check(name: str, tensor: Tensor, stored: Tensor, place: Place) -> None:
    if not same_bytes(stored, tensor):
        raise UserError(
            f"{place.file} does not hold what was written to it for {name}: check the disk."
        )
