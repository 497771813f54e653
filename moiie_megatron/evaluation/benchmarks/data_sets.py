"""Where the data sets of the benchmarks are on this machine, seen without loading them.

``datasets`` takes a directory of the data set's name before it asks the hub, and its cache when
the hub cannot be asked.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moiie_megatron.evaluation.benchmarks.catalogue import Benchmark, DataSet

_DATA_FILES = ("*.parquet", "*.arrow", "*.json", "*.jsonl", "*.csv", "*.zip", "*.tar")
_YES = {"1", "ON", "YES", "TRUE"}


@dataclass(frozen=True)
class DataPlaces:
    """Where lmms-eval finds data sets.

    Attributes:
        directory: Holds directories such as ``lmms-lab-encoder/POPE``.
        cache: Of the library ``datasets``.
        offline: Whether the hub may not be asked.
    """

    directory: Path
    cache: Path
    offline: bool

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], data: str | None) -> DataPlaces:
        """As ``datasets`` reads its variables; ``data`` is the directory that a user has named."""
        home = environment.get("HF_HOME") or "~/.cache/huggingface"
        cache = environment.get("LMMS_EVAL_DATASETS_CACHE") or environment.get("HF_DATASETS_CACHE")
        offline = any(
            environment.get(name, "").upper() in _YES
            for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
        )
        return cls(
            Path(data or ".").expanduser().absolute(),
            Path(cache or f"{home}/datasets").expanduser().absolute(),
            offline,
        )

    def variables(self, benchmark: Benchmark) -> dict[str, str]:
        """What the environment of a benchmark's process needs.

        ``datasets`` knows a directory in its cache by the relative name alone, and would go on with
        rows of another directory or of older files: what is in the directory gets a cache of its
        own.
        """
        found = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} if self.offline else {}
        files = [file for data in benchmark.data for file in self._files(data)]
        if not files:
            return found
        digest = hashlib.sha256()
        for file in files:
            status = file.stat()
            digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        cache = str(self.cache / f"local-{digest.hexdigest()[:16]}")
        return found | {"HF_DATASETS_CACHE": cache, "LMMS_EVAL_DATASETS_CACHE": cache}

    def _files(self, data: DataSet) -> list[Path]:
        """The files of a data set in the directory."""
        directory = self.directory / data.name
        return sorted(file for pattern in _DATA_FILES for file in directory.rglob(pattern))

    def find(self, data: DataSet) -> Path | None:
        """The directory of a data set, or None if it would have to be downloaded."""
        if self._files(data):
            return self.directory / data.name
        cached = self.cache / cache_name(data.name)
        configs = cached.glob("*") if data.config is None else [cached / data.config]
        # datasets writes CONFIG/VERSION/HASH
        return cached if any(file for c in configs for file in c.glob("*/*/*.arrow")) else None

    def missing(self, benchmark: Benchmark) -> list[DataSet]:
        """The data sets of a benchmark that are not here."""
        return [data for data in benchmark.data if self.find(data) is None]

    def description(self) -> str:
        """Where data sets are looked for, for a person."""
        hub = "the hub is not asked (offline)" if self.offline else "then the hub"
        return f"{self.directory}/NAME, then the cache {self.cache}, {hub}"


def cache_name(name: str) -> str:
    """The directory of a data set in the cache: ``lmms-lab-encoder___vq_av2`` for VQAv2."""
    namespace, _, last = name.rpartition("/")
    last = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", last)
    last = re.sub(r"([a-z\d])([A-Z])", r"\1_\2", last).lower()
    return f"{namespace}___{last}" if namespace else last
