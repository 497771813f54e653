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
    return renamed
