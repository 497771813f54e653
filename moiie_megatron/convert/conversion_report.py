"""The report of a conversion: what went in, what came out, and that it is what it should be.

Source files are hashed and what was written is read back and hashed beside the writing, each by
one thread, the reading back a few tensors behind at most.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from moiie_megatron import __version__
from moiie_megatron.checkpoint.directory import REPORT_FILE
from moiie_megatron.convert.dcp.writer import Place
from moiie_megatron.convert.tensor_bytes import TensorBytes
from moiie_megatron.families.transforms import TensorInfo
from moiie_megatron.utils.digest import XXH3_128, file_digest
from moiie_megatron.utils.errors import UserError

_BEHIND = 3  # tensors


class ConversionReport:
    """Collects what ``write`` puts into ``conversion_report.json``.

    Args:
        operation: Which conversion, and its options.
        sources: Files to hash, from the first moment of the ``with`` block on.
    """

    def __init__(self, operation: dict[str, Any], sources: Iterable[Path]) -> None:
        self._operation = operation
        # One thread for files, one for tensors: neither waits for the other.
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._files = ThreadPoolExecutor(max_workers=1)
        self._sources: dict[Path, Future[str]] = {}
        self._to_hash = tuple(sources)
        self._pending: deque[Future[None]] = deque()
        self._tensors: dict[str, dict[str, Any]] = {}
        self._experts: dict[str, dict[str, bool]] = {}
        self._routers: dict[str, dict[str, float]] = {}

    def __enter__(self) -> ConversionReport:
        hash_file = partial(file_digest, algorithm=XXH3_128)
        self._sources = {file: self._files.submit(hash_file, file) for file in self._to_hash}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pool in (self._pool, self._files):
            pool.shutdown(wait=True, cancel_futures=True)

    def add(self, name: str, data: TensorBytes, place: Place) -> None:
        """Note a tensor that was written whole, and check what was written."""
        self._submit(self._add, name, data, place)

    def add_router(self, name: str, data: TensorBytes, place: Place) -> None:
        """Note a router: as ``add``, and its mean and standard deviation."""
        values = data.tensor().float()
        self._routers[name] = {"mean": values.mean().item(), "std": values.std().item()}
        self.add(name, data, place)

    def add_expert(
        self,
        name: str,
        data: TensorBytes,
        place: Place,
        *,
        layer: int,
        expert: str,
        dense: TensorBytes | None,
    ) -> None:
        """Note one expert's part of a tensor and compare what was written with the dense FFN.

        Args:
            expert: The expert's name, ``vision.0``.
            dense: The dense FFN's tensor; None where the experts were pretrained.
        """
        self._submit(self._add_expert, name, data, place, layer, expert, dense)

    def write(self, directory: Path) -> None:
        """Wait for what is still being hashed and write the report.

        Raises:
            UserError: A source cannot be read any more, or what was written reads back wrong.
        """
        while self._pending:
            self._pending.popleft().result()
        content = {
            "tool": f"moiie-megatron {__version__}",
            **self._operation,
            "digests": {"sources": XXH3_128, "tensors": XXH3_128},
            "sources": {
                str(file): {"bytes": file.stat().st_size, "digest": future.result()}
                for file, future in self._sources.items()
            },
            "experts_equal_dense_ffn": self._experts,
            "routers": self._routers,
            "tensors": self._tensors,
        }
        (directory / REPORT_FILE).write_text(json.dumps(content, indent=1) + "\n")

    def _submit(self, task: Any, *arguments: Any) -> None:
        if len(self._pending) >= _BEHIND:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(task, *arguments))

    def _add(self, name: str, data: TensorBytes, place: Place) -> None:
        digest = _stored_digest(name, data, place, data.info.shape)
        self._tensors[name] = _entry(data.info) | {"digest": digest}

    def _add_expert(
        self,
        name: str,
        data: TensorBytes,
        place: Place,
        layer: int,
        expert: str,
        dense: TensorBytes | None,
    ) -> None:
        digest = _stored_digest(name, data, place, (1, *data.info.shape))
        entry = self._tensors.setdefault(name, _entry(data.info) | {"digests": {}})
        entry["digests"][expert] = digest
        if dense is not None:
            of_layer = self._experts.setdefault(str(layer), {})
            of_layer[expert] = of_layer.get(expert, True) and digest == dense.digest


def _entry(info: TensorInfo) -> dict[str, Any]:
    return {"shape": list(info.shape), "dtype": str(info.dtype).removeprefix("torch.")}


def _stored_digest(name: str, data: TensorBytes, place: Place, shape: tuple[int, ...]) -> str:
    """The digest of what the file holds, which must be what was to be written."""
    found = place.find()
    stored = found.tensor_bytes()
    is_like = found.info == TensorInfo(shape, data.info.dtype)
    if stored is None or not is_like or stored.digest != data.digest:
        raise UserError(
            f"{place.file} does not hold what was written to it for {name}: check the disk."
        )
    return stored.digest
