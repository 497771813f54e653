"""What the CPU computes, to compare with: written by a process of its own.

The CPU backend patches Megatron-Core for the whole process (``mcore/patches/cpu.py``), so one
process cannot hold the model on both devices.  ``CpuReferences`` starts the process
(``cpu_process.py``), which writes ``DIRECTORY/NAME.pt`` for every name, and reads the files.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from moiie_megatron.mcore.process_lifetime import start_child

_PROGRAM: Final = "moiie_megatron.selftest.cpu_process"
_POLL: Final = 0.05  # seconds
# A single process, whatever launcher started its parent.
_LAUNCHER: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")


class CpuReferences:
    """Records that a process on the CPU computes while the first checks run.

    Args:
        directory: For the files.
        ranks: Number of ranks of the self-test: decides the number of micro-batches.
        names: What to compute, in this order (``parity.record``).
    """

    def __init__(self, directory: Path, ranks: int, names: Sequence[str]) -> None:
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        if not names:
            return
        environment = {k: v for k, v in os.environ.items() if k not in _LAUNCHER}
        environment["CUDA_VISIBLE_DEVICES"] = ""
        self._log = directory / "reference.log"
        with self._log.open("wb") as log:
            self._process = start_child(
                [sys.executable, "-m", _PROGRAM, str(directory), str(ranks), *names],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def get(self, name: str) -> dict[str, Tensor]:
        """A record; waits until it is there.

        Raises:
            RuntimeError: The process has ended without it.
        """
        file = self._directory / f"{name}.pt"
        while not file.exists():
            if self._process is None or self._process.poll() is not None:
                if file.exists():  # written just before its end
                    break
                tail = self._log.read_text(errors="replace")[-2000:] if self._process else ""
                raise RuntimeError(f"No reference {name} from the CPU. {tail}")
            time.sleep(_POLL)
        result: dict[str, Tensor] = torch.load(file)
        return result

    def close(self) -> None:
        """End the process, if it is still there."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
