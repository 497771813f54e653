"""Configuration keys that had another name in an earlier version.

In a user's file they are an error that names the new key; in the saved configuration of a run or
a checkpoint they are read.
"""

from __future__ import annotations

from typing import Any

# Old dotted key -> new dotted key.
RENAMED = {
    "moe.image_share": "moe.image_fraction",
    "moe.reference_mask": "moe.last_image_token_as_text",
    "data.backend": "data.loader",
    "data.max_bad_share": "data.max_skipped_fraction",
    "train.max_bad_steps": "train.max_skipped_steps",
}


def rename_keys(data: dict[str, Any]) -> dict[str, Any]:
    """A saved configuration with old keys replaced by the new ones."""
    renamed = {k: dict(v) if isinstance(v, dict) else v for k, v in data.items()}
    for old, new in RENAMED.items():
        (section, before), after = old.split("."), new.rpartition(".")[2]
        values = renamed.get(section)
        if isinstance(values, dict) and before in values:
            values.setdefault(after, values.pop(before))
    _take_stage_sizes(renamed)
    return renamed


def _take_stage_sizes(data: dict[str, Any]) -> None:
    """Layers of the first and last stage, once fields of the ``megatron`` section."""
    megatron = data.get("megatron")
    if not isinstance(megatron, dict):
        return
    first, last = (
        megatron.pop(f"num_layers_in_{end}_pipeline_stage", None) for end in ("first", "last")
    )
    if first is None and last is None:
        return
    ends = [size for size in (first, last) if size is not None]
    stages, layers = data["parallel"]["pipeline"], data["language"]["num_layers"]
    middle = stages - len(ends)
    sizes = [(layers - sum(ends)) // middle] * middle if middle else []
    data["parallel"]["pipeline_layers"] = [
        *([] if first is None else [first]),
        *sizes,
        *([] if last is None else [last]),
    ]
