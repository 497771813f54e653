"""Write a Megatron checkpoint, with the report of the conversion, completely or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from moiie_megatron.checkpoint.directory import CONFIG_FILE, FORMAT_VERSION
from moiie_megatron.checkpoint.manifest import write_manifest
from moiie_megatron.checkpoint.progress import Progress
from moiie_megatron.config.load import dump_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.convert.conversion_report import ConversionReport
from moiie_megatron.convert.dcp.writer import CheckpointWriter
from moiie_megatron.convert.tensor_bytes import TensorBytes
from moiie_megatron.families import weight_map
from moiie_megatron.families.weight_map import WeightMapping
from moiie_megatron.layout.experts import ExpertLayout
from moiie_megatron.utils.directories import new_directory
from moiie_megatron.utils.progress import ProgressCounter, ProgressFn

MARKER: Final = "metadata.json"  # by which a checkpoint is recognised before it is replaced


@contextmanager
def checkpoint_output(
    out: Path,
    *,
    num_bytes: int,
    force: bool,
    progress: ProgressFn | None = None,
    report: ConversionReport | None = None,
) -> Iterator[CheckpointOutput]:
    """A directory to fill; it gets its name when the block ends, and is gone after an error.

    Args:
        num_bytes: Of all tensors.
        force: Replace an earlier checkpoint at ``out``.
        progress: Told about every tensor written.
        report: Gets every tensor that is written by its row.

    Raises:
        UserError: ``out`` may not be replaced, the disk is too full, or a file cannot be read or
            written, or does not read back.
    """
    with ExitStack() as stack:
        directory = stack.enter_context(
            new_directory(out, num_bytes=num_bytes, force=force, marker=MARKER)
        )
        if report is not None:  # inside: its threads end before the directory is removed
            stack.enter_context(report)
        writer = stack.enter_context(CheckpointWriter(directory))
        yield CheckpointOutput(directory, writer, ProgressCounter(num_bytes, progress), report)


@dataclass(frozen=True)
class CheckpointOutput:
    """The checkpoint while it is written; made by ``checkpoint_output``."""

    directory: Path
    writer: CheckpointWriter
    progress: ProgressCounter
    report: ConversionReport | None

    def write(
        self,
        row: WeightMapping,
        data: TensorBytes,
        layout: ExpertLayout,
        dense: TensorBytes | None = None,
    ) -> None:
        """Write what a row of the table stands for: a whole tensor, or one expert's part.

        Args:
            dense: The dense FFN's tensor that an expert is a copy of; None where it is none.
        """
        name = row.megatron
        if row.expert is None:
            place = self.writer.write(name, data)
        else:
            place = self.writer.write_expert(name, data, row.expert, layout.num_experts)
        if self.report is not None:
            if row.expert is not None:
                assert row.layer is not None
                self.report.add_expert(
                    name,
                    data,
                    place,
                    layer=row.layer,
                    expert=layout.name(row.expert),
                    dense=dense,
                )
            elif weight_map.ROUTER in name:
                self.report.add_router(name, data, place)
            else:
                self.report.add(name, data, place)
        self.progress.add(data.info.num_bytes)

    def write_part(
        self, name: str, part: Tensor, shape: Sequence[int], offsets: Sequence[int]
    ) -> None:
        """Write a part of a tensor of this shape."""
        self.writer.write_part(name, part, shape, offsets)
        self.progress.add(part.nbytes)

    def finish(self, config: RunConfig, common: dict[str, Any]) -> None:
        """Write what makes the files a checkpoint.

        Args:
            config: A run that could start from it.
            common: See ``CheckpointWriter.finish``.

        Raises:
            UserError: A tensor does not read back.
        """
        (self.directory / CONFIG_FILE).write_text(dump_config(config))
        if self.report is not None:
            self.report.write(self.directory)
        self.writer.finish(common)
        write_manifest(self.directory)


def initial_state(seed: int) -> dict[str, Any]:
    """The common state of a checkpoint in which no step has been taken (``save_load.py``)."""
    return {
        "format_version": FORMAT_VERSION,
        "world_size": 1,
        "progress": Progress(step=0, consumed_samples=0, identity={"seed": seed}).to_state(),
    }
