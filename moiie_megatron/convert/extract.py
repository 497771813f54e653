"""Extract: one expert of every MoE layer becomes the FFN of a dense Hugging Face model.

The paper's analysis of what single experts have learned: attention, embeddings, vision tower and
connector stay, routers and all other experts are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from moiie_megatron.config.messages import listed
from moiie_megatron.config.schema import MoEConfig, RunConfig
from moiie_megatron.convert.dcp.reader import CheckpointReader
from moiie_megatron.convert.export import MARKER, export_from, exported_rows
from moiie_megatron.convert.tensor_bytes import TensorBytes
from moiie_megatron.families import weight_map
from moiie_megatron.families.transforms import TensorInfo
from moiie_megatron.utils.directories import check_output
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.progress import NoteFn, ProgressFn


def extract_expert(
    checkpoint: str | Path,
    experts: Sequence[str],
    out: str | Path,
    *,
    force: bool = False,
    progress: ProgressFn | None = None,
    note: NoteFn | None = None,
) -> Path:
    """Write a dense model that transformers loads with ``trust_remote_code=True``.

    Args:
        checkpoint: A checkpoint folder, or a run's output folder (its newest checkpoint).
        experts: ``vision.0``, ``shared.1``, ``text.0``: one for all layers, or one for each MoE
            layer.
        force: Replace an earlier export at ``out``.
        progress: Told about every tensor written.
        note: Told what the export cannot promise, or leaves out.

    Returns:
        ``out``.

    Raises:
        UserError: A dense checkpoint, an expert that it does not have, or what
            ``export_checkpoint`` raises.
    """
    out = Path(out)
    check_output(out, force=force, marker=MARKER)
    reader = CheckpointReader(checkpoint)
    expert = OneExpert(reader, chosen_experts(reader, experts))
    export_from(expert, out, force, progress=progress, note=note)
    return out


def chosen_experts(reader: CheckpointReader, experts: Sequence[str]) -> dict[int, int]:
    """Logical expert id by MoE layer.

    Raises:
        UserError: See ``extract_expert``.
    """
    layers, layout = reader.config.moe_layers, reader.config.moe.layout
    if not layers:
        raise UserError(f"{reader.folder} is dense, it has no experts to extract: export it.")
    ids = {layout.name(expert): expert for expert in range(layout.num_experts)}
    for name in experts:
        if name not in ids:
            raise UserError(f"The expert {name} is not in {reader.folder}: use {listed(ids)}.")
    if len(experts) not in (1, len(layers)):
        raise UserError(
            f"{len(experts)} experts are named but {reader.folder} has {len(layers)} MoE layers: "
            "name one for all of them, or one for each."
        )
    names = list(experts) * (len(layers) if len(experts) == 1 else 1)
    return {layer: ids[name] for layer, name in zip(layers, names, strict=True)}


class OneExpert:
    """Reads like a dense checkpoint, its FFNs are experts of another.

    Args:
        reader: The checkpoint with experts.
        chosen: Logical expert id by MoE layer.
    """

    def __init__(self, reader: CheckpointReader, chosen: Mapping[int, int]) -> None:
        self._reader = reader
        config, dense = reader.config, MoEConfig(variant="dense")
        stage = config.stage.model_copy(update={"moe": False})
        self.folder = reader.folder
        self.config: RunConfig = config.model_copy(update={"moe": dense, "stage": stage})
        rows = weight_map.language_rows(config.language, config.moe.layout, config.moe_layers)
        # Dense name -> name in the checkpoint and expert.
        self._sources = {
            weight_map.dense_name(row.megatron): (row.megatron, row.expert)
            for row in rows
            if row.expert is None or (row.layer is not None and row.expert == chosen[row.layer])
        }
        self.tensors = {row.megatron: self.info(row.megatron) for row in exported_rows(self.config)}

    def info(self, name: str, expert: int | None = None) -> TensorInfo:
        """Shape and dtype of a tensor of the dense model; ``expert`` is always None."""
        return self._reader.info(*self._sources.get(name, (name, expert)))

    def get_bytes(self, name: str, expert: int | None = None) -> TensorBytes:
        """A tensor of the dense model."""
        return self._reader.get_bytes(*self._sources.get(name, (name, expert)))
