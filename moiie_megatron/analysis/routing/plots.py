"""All figures of routing from the records of one model."""

from __future__ import annotations

from pathlib import Path

from moiie_megatron.analysis.routing.groups import plot_groups
from moiie_megatron.analysis.routing.load_map import plot_load_map
from moiie_megatron.analysis.routing.pathways import plot_pathways
from moiie_megatron.routing_stats.expert_use import ExpertUse
from moiie_megatron.routing_stats.reading import newest
from moiie_megatron.utils.jsonl import Records


def plot_routing(records: Records, out: str | Path, *, last: int = 50) -> list[Path]:
    """Write ``pathways.png``, ``groups.png`` and, for a training run, ``load_map.png``.

    Args:
        records: Of one model (``read_routing``).
        out: Output directory.
        last: Number of final optimizer steps that the first two figures average over.

    Raises:
        UserError: Records of several models, or none.
    """
    out = Path(out)
    use = ExpertUse.from_records(newest(records, last))
    files = [plot_pathways(use, out / "pathways.png"), plot_groups(use, out / "groups.png")]
    if all("step" in record for record in records):
        files.append(plot_load_map(records, out / "load_map.png"))
    return files
