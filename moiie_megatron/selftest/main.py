"""From options to a finished report."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist

from moiie_megatron.mcore.dist_env import DistEnv, connect_store
from moiie_megatron.mcore.parallel import destroy_parallel
from moiie_megatron.mcore.process_lifetime import kill_children_on_exit
from moiie_megatron.selftest.catalogue import CHECKS, GROUPS
from moiie_megatron.selftest.check import FAIL, Check, Session
from moiie_megatron.selftest.exchange import Exchange
from moiie_megatron.selftest.reference import CpuReferences
from moiie_megatron.selftest.report import Report
from moiie_megatron.selftest.runner import Runner
from moiie_megatron.utils.errors import UserError

_BEFORE_GROUPS: Final = ("versions", GROUPS)


def list_checks() -> str:
    """A line per check."""
    return "\n".join(f"{check.name:<16}{check.about}" for check in CHECKS)


def run_selftest(
    dist_env: DistEnv,
    *,
    device: str = "auto",
    only: Sequence[str] | None = None,
    quick: bool = False,
    json_file: Path | None = None,
    directory: Path | None = None,
) -> int:
    """Run the checks; every rank calls this.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        only: Names of checks; None is all of them.
        quick: Leave out what takes long.
        json_file: Where rank 0 writes the report.
        directory: Parent of the temporary files.  None is the system's, which the processes of one
            node share.

    Returns:
        The exit code: 0 if no check failed.

    Raises:
        UserError: No check of such a name, no GPU although one was asked for, or a directory that
            does not exist.
    """
    checks = select(only)
    device = _device(device)
    for path in (directory, json_file and json_file.absolute().parent):
        if path is not None and not path.is_dir():
            raise UserError(f"{path} is not a directory: create it or name another.")
    kill_children_on_exit()
    store = dist.PrefixStore("selftest", connect_store(dist_env))
    # A single process has its store in memory, which threads share.
    watching = store
    if dist_env.world_size > 1:
        watching = dist.PrefixStore("selftest", connect_store(dist_env))
    shared = _shared_directory(dist_env, store, directory)
    names = [name for check in checks for name in check.reference]
    own = Path(tempfile.mkdtemp(prefix="moiie-selftest-"))
    references = CpuReferences(own, dist_env.world_size, names if dist_env.rank == 0 else ())
    session = Session(dist_env, device, quick, shared, references)
    settings = {
        "host": platform.node(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": device,
        "ranks": dist_env.world_size,
        "quick": quick,
    }
    report = Report(dist_env.rank, settings, json_file)

    def clean_up() -> None:
        references.close()
        shutil.rmtree(own, ignore_errors=True)
        if shared is not None and dist_env.rank == 0:
            shutil.rmtree(shared, ignore_errors=True)

    exchanges = [Exchange(s, dist_env.rank, dist_env.world_size) for s in (store, watching)]
    try:
        Runner(session, report, exchanges[0], exchanges[1], clean_up).run(checks)
    finally:
        clean_up()
    exchanges[0].leave_together()
    if report.status == FAIL:
        return 1
    destroy_parallel()
    return 0


def select(only: Sequence[str] | None) -> list[Check]:
    """The checks to run, with the process groups wherever a check needs them.

    Raises:
        UserError: There is no check of such a name.
    """
    names = [check.name for check in CHECKS]
    for name in only or ():
        if name not in names:
            raise UserError(f"--only {name}: there is no such check, but {', '.join(names)}.")
    wanted = set(names if only is None else only)
    if wanted - set(_BEFORE_GROUPS):
        wanted.add(GROUPS)
    return [check for check in CHECKS if check.name in wanted]


def _device(wanted: str) -> str:
    """Cpu or cuda.

    Raises:
        UserError: There is no GPU although one was asked for.
    """
    if torch.cuda.device_count() == 0 and (
        wanted == "cuda" or (wanted == "auto" and torch.version.cuda)
    ):
        raise UserError(
            f"--device is {wanted}, but torch {torch.__version__} (CUDA {torch.version.cuda}) sees "
            "no GPU: look at nvidia-smi, or use --device cpu."
        )
    if wanted == "auto":
        return "cuda" if torch.cuda.device_count() else "cpu"
    return wanted


def _shared_directory(dist_env: DistEnv, store: dist.Store, parent: Path | None) -> Path | None:
    """A new directory that all ranks see; None if there is none."""
    on_this_node = int(os.environ.get("LOCAL_WORLD_SIZE", dist_env.world_size))
    if parent is None and on_this_node != dist_env.world_size:
        return None
    if dist_env.rank == 0:
        store.set(
            "directory",
            tempfile.mkdtemp(prefix="moiie-selftest-", dir=parent and parent.absolute()),
        )
    return Path(store.get("directory").decode())
