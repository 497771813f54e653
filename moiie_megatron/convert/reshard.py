"""Rewrite a checkpoint in the pieces that the ranks of another parallel layout read.

Never required: every layout reads every checkpoint.  But torch's reader loads a stored piece as a
whole for each request that touches it, so a rank that needs a part of a piece reads all of it.
After resharding every request is one piece, and the pieces of a rank lie in a few files.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from moiie_megatron.checkpoint.directory import CONFIG_FILE
from moiie_megatron.checkpoint.manifest import MANIFEST_FILE
from moiie_megatron.config.schema import ParallelConfig, RunConfig
from moiie_megatron.config.validate import check_config
from moiie_megatron.convert.checkpoint_output import MARKER, checkpoint_output
from moiie_megatron.convert.dcp.reader import CheckpointReader
from moiie_megatron.convert.dcp.shard_plan import TensorShards, shard_plan, unsplit
from moiie_megatron.families.weight_map import model_rows
from moiie_megatron.utils.directories import check_output
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.progress import ProgressFn

# Optimizer state is named after the weight that it belongs to, and cut like it.
_OPTIMIZER = re.compile(r"^optimizer\.state\.\w+\.")
_WRITTEN_ANEW = (".metadata", "metadata.json", "common.pt", CONFIG_FILE, MANIFEST_FILE)


def reshard_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    parallel: ParallelConfig,
    *,
    force: bool = False,
    progress: ProgressFn | None = None,
) -> Path:
    """Write a copy of a checkpoint, cut for a layout.

    Everything in the checkpoint is carried: weights and optimizer state in new pieces, the rest
    as it is.  One piece is in memory at a time.

    Args:
        checkpoint: A checkpoint folder, or a run's output folder (its newest checkpoint).
        parallel: The layout.
        force: Replace an earlier checkpoint at ``out``.
        progress: Told about every piece written.

    Returns:
        ``out``.

    Raises:
        UserError: A checkpoint that is incomplete or of a newer version, a layout that its model
            cannot have, or an output that may not be replaced or does not fit.
    """
    out = Path(out)
    check_output(out, force=force, marker=MARKER)
    reader = CheckpointReader(checkpoint)
    config = _with_layout(reader.config, parallel)
    by_file = _plan(reader, config)
    total = sum(info.num_bytes for info in reader.tensors.values())
    with checkpoint_output(out, num_bytes=total, force=force, progress=progress) as output:
        for _, pieces in sorted(by_file.items()):
            output.writer.new_file()
            for name, cut in pieces:
                part = reader.get_part(name, cut.offsets, cut.shape)
                output.write_part(name, part, reader.tensors[name].shape, cut.offsets)
        output.writer.new_file()
        for name in reader.objects:
            output.writer.write_object(name, reader.get_object(name))
        _copy_files(reader.folder, output.directory)
        output.finish(config, reader.common)
    return out


def _with_layout(config: RunConfig, parallel: ParallelConfig) -> RunConfig:
    if not config.moe_layers and (parallel.expert, parallel.expert_tensor) != (1, 1):
        raise UserError(
            f"parallel.expert is {parallel.expert} and parallel.expert_tensor is "
            f"{parallel.expert_tensor}, but the checkpoint has no experts: leave both at 1."
        )
    config = config.model_copy(update={"parallel": parallel})
    check_config(config)
    return config


def _plan(
    reader: CheckpointReader, config: RunConfig
) -> dict[tuple[int, str], list[tuple[str, TensorShards]]]:
    """The pieces of every file: one per stage and owner, optimizer state by itself."""
    by_file: dict[tuple[int, str], list[tuple[str, TensorShards]]] = {}
    rows = {row.megatron: row for row in model_rows(config)}
    for name, info in reader.tensors.items():
        weight = _OPTIMIZER.sub("", name)
        kind = "weights" if weight == name else "optimizer"
        row = rows.get(weight)
        for cut in unsplit(info.shape) if row is None else shard_plan(config, row, info.shape):
            owner = " ".join(map(str, cut.owner))
            by_file.setdefault((cut.stage, f"{kind} {owner}"), []).append((name, cut))
    return by_file


def _copy_files(source: Path, folder: Path) -> None:
    """Tokenizer, processor, conversion report: whatever is not written anew."""
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".distcp" and file.name not in _WRITTEN_ANEW:
            shutil.copy(file, folder / file.name)
