"""The process that computes the references: ``python -m`` this module ``DIRECTORY RANKS NAME ...``.

Without Transformer Engine and Apex, even where they are installed: Megatron-Core would take their
optimizers and norms, which have no kernels for the CPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

_GPU_ONLY: Final = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C")


def main() -> None:
    """Compute the records that the arguments name (``parity.record``)."""
    for name in _GPU_ONLY:
        sys.modules[name] = None  # type: ignore[assignment]  # importing it raises ImportError
    # Imported now, with Megatron-Core, which looks for them.
    import torch

    from moiie_megatron.config.schema import ParallelConfig
    from moiie_megatron.mcore.dist_env import DistEnv
    from moiie_megatron.mcore.parallel import destroy_parallel, init_parallel
    from moiie_megatron.selftest.checks.parity import record
    from moiie_megatron.utils.files import atomic_write

    directory, ranks, *names = sys.argv[1:]
    context = init_parallel(ParallelConfig(), DistEnv(), device="cpu", transformer_impl="local")
    for name in names:
        values = record(name, context, int(ranks))
        with atomic_write(Path(directory) / f"{name}.pt") as path:
            torch.save(values, path)
    destroy_parallel()


if __name__ == "__main__":
    main()
