"""The state of a run as a distributed checkpoint, written and read in any layout.

A run's checkpoints live in ``OUTPUT/checkpoints/step_0000100``; ``latest`` beside them names
the newest complete one.  Each is a Megatron ``torch_dist`` checkpoint and also holds the
resolved configuration and the tokenizer, so that it can be used without the run around it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch.distributed.checkpoint.api import CheckpointException

from moiie_megatron.checkpoint.directory import CONFIG_FILE, FORMAT_VERSION
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.mcore.patches.dist_checkpointing import (
    add_dummy_step_state,
    patch_optimizer_loading,
    use_file_results_queue,
)
from moiie_megatron.utils.errors import UserError


@dataclass(frozen=True)
class Progress:
    """How far a run is, and what the order of its samples and its schedule depend on.

    Attributes:
        num_samples: Samples per epoch.
        blend: Samples per epoch of every source (``Blend.describe``); older checkpoints have
            none.
        schedule: What the learning rates of all steps depend on; older checkpoints have none.
        experts: Which experts the model has; older checkpoints do not say.
        skipped_samples: Samples left out so far, on all ranks.
        skipped: Steps that changed nothing, because loss or gradient was not finite.
    """

    step: int
    consumed_samples: int
    num_samples: int
    seed: int
    blend: str = ""
    schedule: str = ""
    experts: str = ""
    skipped_samples: int = 0
    skipped: int = 0

    @property
    def updates(self) -> int:
        """Steps that the optimizer has made."""
        return self.step - self.skipped


def sharding_metadata(context: ParallelContext) -> dict[str, Any]:
    """How Megatron cuts the state: every layer under its own name, any layout reads it back."""
    return {
        "dp_cp_group": context.groups.dp_cp,
        # MoE and dense layers differ, and a dense checkpoint must have the same names.
        "non_homogeneous_layers": True,
        # The default type cannot change TP, PP or EP.
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
    }


def request_save(
    folder: Path, context: ParallelContext, parts: dict[str, Any], progress: Progress
) -> AsyncRequest:
    """What has to be written, and done then on all ranks, to save a run; every rank calls this.

    Args:
        folder: A new folder; what is there is removed.
        parts: ``model``, ``optimizer`` and ``scheduler``; ``stream`` where the data have a state
            of their own; ``counters``, further values with ``state_dict`` and
            ``load_state_dict`` by name, alike on all ranks.
    """
    metadata = sharding_metadata(context)
    with add_dummy_step_state(parts["optimizer"], progress.updates):
        state = _sharded_state(parts, context, metadata, is_loading=False)
    state["progress"] = asdict(progress)
    state["counters"] = {name: part.state_dict() for name, part in _counters(parts)}
    state["format_version"] = FORMAT_VERSION
    state["world_size"] = context.size
    if context.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    dist.barrier()
    stored = {k: v for k, v in metadata.items() if k != "dp_cp_group"}
    use_file_results_queue()
    request = dist_checkpointing.save(
        state, str(folder), content_metadata=stored, async_sharded_save=True
    )
    assert request is not None
    return request


def load_checkpoint(folder: Path, context: ParallelContext, parts: dict[str, Any]) -> Progress:
    """Load weights, optimizer, schedule and RNG into ``parts``, from any layout into this one.

    Raises:
        UserError: The folder is no checkpoint, of a newer version, or does not fit the model.
    """
    metadata = sharding_metadata(context)
    common = load_common(folder)
    optimizer, updates = parts["optimizer"], Progress(**common["progress"]).updates
    with add_dummy_step_state(optimizer, updates), patch_optimizer_loading(optimizer):
        return _load_state(folder, context, parts, common, metadata)


def _load_state(
    folder: Path,
    context: ParallelContext,
    parts: dict[str, Any],
    common: dict[str, Any],
    metadata: dict[str, Any],
) -> Progress:
    state = _sharded_state(parts, context, metadata, is_loading=True)
    if common["world_size"] != context.size:
        del state["rng"]  # states of single ranks have no meaning in another layout
    loaded = read_sharded(folder, state)
    parts["model"].load_state_dict(loaded["model"])
    parts["optimizer"].load_state_dict(loaded["optimizer"])
    parts["scheduler"].load_state_dict(loaded["scheduler"])
    if "stream" in parts:
        parts["stream"].restore(loaded["stream"])
    if "rng" in loaded:
        _set_rng(loaded["rng"], context)
    for name, part in _counters(parts):
        if name in common.get("counters", {}):
            part.load_state_dict(common["counters"][name])
    return Progress(**common["progress"])


def load_common(folder: Path) -> dict[str, Any]:
    """What every rank reads alike: progress, versions, schedule.

    Raises:
        UserError: The folder is no checkpoint of this project or of a newer version of it.
    """
    if not folder.is_dir():
        raise UserError(f"There is no checkpoint folder {folder}.")
    try:
        common = dist_checkpointing.load_common_state_dict(str(folder))
    except (CheckpointingException, OSError, EOFError, RuntimeError) as error:
        raise UserError(
            f"{folder} is not a complete Megatron checkpoint ({_first_line(error)}): use a "
            "folder named step_... under a run's checkpoints, or a converted checkpoint."
        ) from error
    version = common.get("format_version")
    if version is None or version > FORMAT_VERSION:
        raise UserError(
            f"{folder} has format version {version}, this program reads up to {FORMAT_VERSION}: "
            "update moiie-megatron."
        )
    return common


def read_sharded(folder: Path, state: dict[str, Any], **options: Any) -> dict[str, Any]:
    """``dist_checkpointing.load`` with one-sentence errors.

    Raises:
        UserError: A tensor is missing or has another shape than this model wants.
    """
    try:
        return dist_checkpointing.load(state, str(folder), **options)
    except (Exception, CheckpointException) as error:  # the readers raise many types
        # Torch wraps what a rank met in a BaseException whose own text only counts ranks.
        causes = error.failures.values() if isinstance(error, CheckpointException) else ()
        cause = next((inner for inner, _ in causes), error)
        raise UserError(
            f"The checkpoint {folder} does not fit this run ({_first_line(cause)}): compare its "
            f"{CONFIG_FILE} with the configuration."
        ) from error


def _sharded_state(
    parts: dict[str, Any], context: ParallelContext, metadata: dict[str, Any], *, is_loading: bool
) -> dict[str, Any]:
    model_state = parts["model"].sharded_state_dict(metadata=metadata)
    optimizer_state = parts["optimizer"].sharded_state_dict(
        model_state, is_loading=is_loading, metadata=metadata
    )
    if not is_loading and optimizer_state.get("param_state") == {}:
        # A stage without trained parameters: Megatron would report that rank 0 has some.
        del optimizer_state["param_state"]
    state = {
        "model": model_state,
        "optimizer": optimizer_state,
        "scheduler": parts["scheduler"].state_dict(),
        "rng": ShardedObject("rng", _rng(context), (context.size,), (context.rank,)),
    }
    if "stream" in parts:
        # The same on all tensor- and pipeline-parallel peers of a data-parallel rank.
        peer = (context.groups.tp.rank(), context.groups.pp.rank())
        state["stream"] = ShardedObject(
            "stream", parts["stream"].tensor(), (context.dp_size,), (context.dp_rank,), peer
        )
    return state


def _counters(parts: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    return parts.get("counters", {}).items()


def _rng(context: ParallelContext) -> dict[str, Any]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    state = {"cpu": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if context.device.is_cuda:
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng(state: dict[str, Any], context: ParallelContext) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    torch.set_rng_state(state["cpu"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if context.device.is_cuda and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _first_line(error: BaseException, limit: int = 200) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:limit].rstrip(".:")
