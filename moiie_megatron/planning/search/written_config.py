"""A planned layout as a configuration that can be trained."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moiie_megatron.config import yaml_text
from moiie_megatron.config.load import override_values
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.files import write_output

_RECOMPUTE = ("granularity", "method", "num_layers", "modules")


def check_absent(out: Path) -> None:
    """Refuse to write over a file.

    Raises:
        UserError: There is one.
    """
    if out.exists():
        raise UserError(f"--write is {out}, which exists: name a new file, or remove it.")


def write_config(
    out: Path, base: Path, overrides: Sequence[str], config: RunConfig, comment: str
) -> None:
    """Write a configuration over another one.

    Args:
        out: The new file.
        base: The configuration that was planned.
        overrides: Those of the command line, which go into the file.
        config: ``base`` with them, in the layout that was found.
        comment: A line for its beginning.

    Raises:
        UserError: The file exists or cannot be written.
    """
    check_absent(out)
    values = override_values(overrides)
    for section, layout in _layout_sections(config).items():
        values[section] = {**_mapping(values.get(section)), **layout}
    # A base is read relative to the file that names it.
    values = {"base": os.path.relpath(base, out.parent), **values}
    with write_output(out) as beside:
        beside.write_text(f"# {comment}\n{yaml_text.write(values)}", encoding="utf-8")


def _layout_sections(config: RunConfig) -> dict[str, dict[str, Any]]:
    """What a search changes; null removes what the base has."""
    names = [f"recompute_{name}" for name in _RECOMPUTE]
    return {
        "parallel": config.parallel.model_dump(),
        "megatron": {name: config.megatron.get(name) for name in names},
        "train": {"micro_batch_size": config.train.micro_batch_size},
    }


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}
