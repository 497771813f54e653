"""What is in a checkpoint: parts, sizes, experts, progress."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moiie_megatron.checkpoint.directory import EARLIER_REPORT_FILE, REPORT_FILE
from moiie_megatron.convert.dcp.reader import CheckpointReader
from moiie_megatron.families import weight_map
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.json_file import read_json_object


def describe(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint as plain values.

    Args:
        path: A checkpoint folder, or a run's output folder (its newest checkpoint).

    Returns:
        ``parts`` maps language, experts, routers, vision, connector and optimizer
        to tensors, parameters, bytes and dtypes; the rest is from the configuration, the common
        state and the conversion report.

    Raises:
        UserError: The folder is no complete checkpoint, or one of a newer version.
    """
    reader = CheckpointReader(path)
    config, layout = reader.config, reader.config.moe.layout
    parts: dict[str, dict[str, Any]] = {}
    for name, info in reader.tensors.items():
        empty = {"tensors": 0, "parameters": 0, "bytes": 0, "dtypes": []}
        part = parts.setdefault(weight_map.part_of(name), empty)
        part["tensors"] += 1
        part["bytes"] += info.num_bytes
        part["parameters"] += info.num_bytes // info.dtype.itemsize
        dtype = str(info.dtype).removeprefix("torch.")
        part["dtypes"] = sorted({*part["dtypes"], dtype})
    files = [file for file in reader.folder.iterdir() if file.is_file()]
    reports = (reader.folder / name for name in (REPORT_FILE, EARLIER_REPORT_FILE))
    report = next((file for file in reports if file.is_file()), None)
    return {
        "folder": str(reader.folder),
        "format_version": reader.common["format_version"],
        "step": reader.common["progress"]["step"],
        "bytes": sum(file.stat().st_size for file in files),
        "parts": parts,
        "language": config.language.family,
        "vision": config.vision.family,
        "variant": config.moe.variant if config.moe_layers else "dense",
        "experts": [layout.name(i) for i in range(layout.num_experts)] if config.moe_layers else [],
        "moe_layers": config.moe_layers,
        "conversion": None if report is None else _conversion(report),
    }


def format_description(description: dict[str, Any]) -> str:
    """A few lines for people."""
    lines = [
        f"{description['folder']}: {description['bytes'] / 1e9:.2f} GB, step "
        f"{description['step']}, format version {description['format_version']}",
        f"{description['language']} with {description['vision']}, {description['variant']}"
        + (f", experts {' '.join(description['experts'])}" if description["experts"] else "")
        + (f" in layers {description['moe_layers']}" if description["moe_layers"] else ""),
    ]
    for name, part in description["parts"].items():
        lines.append(
            f"  {name:<10} {part['tensors']:>5} tensors {part['parameters'] / 1e6:>10.2f} M "
            f"values {part['bytes'] / 1e9:>8.3f} GB  {', '.join(part['dtypes'])}"
        )
    conversion = description["conversion"]
    if conversion is not None:
        line = f"conversion: {conversion['operation']} by {conversion['tool']}"
        if conversion["experts"]:
            equal = f"{conversion['equal_experts']} of {conversion['experts']}"
            line += f", experts that equal the dense FFN: {equal}"
        lines.append(line)
    return "\n".join(lines)


def _conversion(file: Path) -> dict[str, Any]:
    content = read_json_object(file, "delete it or copy it again")
    try:
        equal = [x for layer in content["experts_equal_dense_ffn"].values() for x in layer.values()]
        return {
            "operation": content["operation"],
            "tool": content["tool"],
            "experts": len(equal),
            "equal_experts": sum(equal),
            "sources": content["sources"],
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} cannot be read ({error}): delete it or copy it again.") from error
