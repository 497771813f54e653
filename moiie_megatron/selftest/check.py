"""What a check is, what it finds, and what all checks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import torch
from torch import Tensor

from moiie_megatron.mcore.dist_env import DistEnv
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.mcore.patches.moe_utils import router_product_of_torch

Status = Literal["PASS", "FAIL", "SKIP"]
PASS: Final = "PASS"
FAIL: Final = "FAIL"
SKIP: Final = "SKIP"


@dataclass(frozen=True)
class Finding:
    """The outcome of a check.

    Attributes:
        status: The verdict.
        reason: One sentence: what was found, or why the check was skipped.
        figures: What was measured; JSON values.
        fatal: No later check can run.
        seconds: How long the check took.
        trace: The traceback of an unexpected error.
    """

    status: Status
    reason: str
    figures: dict[str, Any] = field(default_factory=dict)
    fatal: bool = False
    seconds: float = 0.0
    trace: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def passed(reason: str, **figures: Any) -> Finding:
    """A PASS with what was found."""
    return Finding(PASS, reason, figures)


def failed(reason: str, **figures: Any) -> Finding:
    """A FAIL with what was found; the runner adds the remedy."""
    return Finding(FAIL, reason, figures)


def skipped(reason: str, **figures: Any) -> Finding:
    """A SKIP with why."""
    return Finding(SKIP, reason, figures)


class References(Protocol):
    """What the CPU computes, to compare with; only rank 0 has them (``reference.py``)."""

    def get(self, name: str) -> dict[str, Tensor]: ...


@dataclass
class Session:
    """What all checks share.

    Attributes:
        dist_env: Rank and number of processes.
        device: ``cpu`` or ``cuda``.
        quick: Leave out what takes long.
        directory: For temporary files; None where the processes share no directory.
        references: What the CPU computes.
        context: Process groups and device; the check "process groups" sets it.
    """

    dist_env: DistEnv
    device: str
    quick: bool
    directory: Path | None
    references: References
    context: ParallelContext | None = None

    @property
    def groups(self) -> ParallelContext:
        """Process groups and device, with Transformer Engine's modules where they can run."""
        assert self.context is not None
        return self.context

    @property
    def local(self) -> ParallelContext:
        """The same with Megatron-Core's local modules."""
        return with_modules(self.groups, transformer_engine=False)

    @property
    def is_cuda(self) -> bool:
        return self.device == "cuda"


def with_modules(context: ParallelContext, *, transformer_engine: bool) -> ParallelContext:
    """The same process groups and device with the other modules."""
    device = replace(context.device, transformer_engine=transformer_engine)
    return replace(context, device=device)


def _cuda(session: Session) -> str | None:
    return None if session.is_cuda else "it needs a GPU"


def _transformer_engine(session: Session) -> str | None:
    if session.groups.device.transformer_engine:
        return None
    return "Transformer Engine is not installed or cannot run on this device"


def _shared_directory(session: Session) -> str | None:
    if session.directory is not None:
        return None
    return "there are several nodes: give a directory that all of them see with --directory"


def _long(session: Session) -> str | None:
    return "it takes long, and --quick was given" if session.quick else None


# Why a requirement is not met in this session, or None.
NEEDS: Final[dict[str, Callable[[Session], str | None]]] = {
    "cuda": _cuda,
    "transformer engine": _transformer_engine,
    "directory": _shared_directory,
    "time": _long,
}


@dataclass(frozen=True)
class Check:
    """One check; every rank runs it.

    Attributes:
        name: For ``--only`` and the report.
        about: What it does, one line.
        run: Returns the finding of this rank; rank 0 knows the figures.
        remedy: What a user does about a FAIL.
        needs: Names in ``NEEDS``; the check is skipped where one of them is not met.
        limit: Seconds after which the check counts as stuck.
        essential: A FAIL of it ends the self-test.
        reference: What it needs of ``Session.references``.
    """

    name: str
    about: str
    run: Callable[[Session], Finding]
    remedy: str
    needs: tuple[str, ...] = ()
    limit: float = 120.0
    essential: bool = False
    reference: tuple[str, ...] = ()

    def unmet(self, session: Session) -> str | None:
        """Why this check cannot run here, or None."""
        reasons = (NEEDS[name](session) for name in self.needs)
        return next((reason for reason in reasons if reason), None)


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 products with all their bits, also on GPUs that would take TF32.

    Those of Transformer Engine's modules are TF32 whatever is set here.
    """
    matmul, conv = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with router_product_of_torch():
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = conv
