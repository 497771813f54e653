"""A survey in numbers: for people as a table, for programs as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from moiie_megatron.data.audit.audit import Audit, Encoding
from moiie_megatron.data.audit.lengths import rows_needed


def summarize(audit: Audit, encoding: Encoding | None) -> dict[str, Any]:
    """One source.

    Returns:
        Counts, every fault, and with an encoding the lengths of the usable samples: ``min``,
        ``median``, ``p99``, ``max``, the share that is cut off, and ``rows``: how many rows of the
        sequence length hold all samples, one each and packed.
    """
    source = audit.source
    bad = np.array([fault.index for fault in audit.skipped_samples], dtype=np.int64)
    good = np.ones(len(audit.lengths), dtype=bool)
    good[bad] = False
    images = audit.images[good]
    values: dict[str, Any] = {
        "name": source.label,
        "records": str(source.records.path),
        "images": str(source.images.root),
        "samples": len(audit.lengths),
        "bad": len(bad),
        "skipped_fraction": audit.skipped_fraction,
        "images_per_sample": {str(n): c for n, c in sorted(Counter(images.tolist()).items())},
        "faults": [
            {"index": fault.index, "reason": fault.reason} for fault in audit.skipped_samples
        ],
    }
    if encoding is not None:
        values |= _lengths(audit.lengths[good], images, encoding)
    return values


def _lengths(lengths: np.ndarray, images: np.ndarray, encoding: Encoding) -> dict[str, Any]:
    if not len(lengths):
        return {"lengths": None, "image_tokens": 0, "rows": None}
    limit = encoding.sequence_length
    packed = rows_needed(lengths, limit)
    return {
        "lengths": {
            "min": int(lengths.min()),
            "median": int(np.quantile(lengths, 0.5, method="lower")),
            "p99": int(np.quantile(lengths, 0.99, method="lower")),
            "max": int(lengths.max()),
            "total": int(lengths.sum(dtype=np.int64)),
            "sequence_length": limit,
            "beyond_sequence_length": float((lengths > limit).mean()),
        },
        "image_tokens": int(images.sum(dtype=np.int64)) * encoding.num_image_tokens,
        "rows": {
            "one_sample_each": len(lengths),
            "packed": packed,
            "packed_fill": float(np.minimum(lengths, limit).sum(dtype=np.int64) / (packed * limit)),
        },
    }


def table(summaries: Sequence[dict[str, Any]]) -> Any:
    """The summaries as a table of rich, a source per row."""
    from rich.table import Table

    columns = ("source", "samples", "bad", "images", "image tokens", "length min/median/p99/max")
    result = Table(*columns, "cut off", "rows packed")
    for values in summaries:
        images = sum(int(n) * count for n, count in values["images_per_sample"].items())
        row = [values["name"], f"{values['samples']:,}", f"{values['bad']:,}", f"{images:,}"]
        lengths, rows = values.get("lengths"), values.get("rows")
        if lengths and rows:
            spread = "/".join(f"{lengths[key]:,}" for key in ("min", "median", "p99", "max"))
            row += [f"{values['image_tokens']:,}", spread]
            row += [f"{lengths['beyond_sequence_length']:.2%}"]
            row += [f"{rows['packed']:,} ({rows['packed_fill']:.0%} full)"]
        result.add_row(*row)
    return result
