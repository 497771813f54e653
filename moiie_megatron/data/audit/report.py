"""The numbers of an audit: as a table for people, as JSON for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from moiie_megatron.data.audit.audit import Audit
from moiie_megatron.data.audit.packed_rows import rows_needed
from moiie_megatron.data.audit.shapes import quantiles, shape_histogram
from moiie_megatron.data.encode.encoding import Encoding

_MANY_TRUNCATED = 0.01  # fraction of the samples of a source


def summarize(audit: Audit, encoding: Encoding | None) -> dict[str, Any]:
    """The numbers of one source.

    Args:
        audit: Of the source.
        encoding: The one of the audit.

    Returns:
        Counts, the ``weight`` of the source, ``notes`` on what is not used of records, and every
        skipped sample; with an encoding also the lengths of the other samples (``min``, ``median``,
        ``p99``, ``max``, ``total`` and the fraction ``beyond_sequence_length``, which is
        truncated), their ``images``, ``image_tokens`` and ``label_tokens``, ``rows``: how many rows
        of the sequence length hold them, one sample in each or packed, ``shapes``: the histogram of
        ``shape_histogram``, and ``markers_in_text``: special tokens in the text of conversations
        and how many records have each.
    """
    source = audit.source
    used = np.ones(len(audit.lengths), dtype=bool)
    used[[sample.index for sample in audit.skipped_samples]] = False
    images = audit.images[used]
    values: dict[str, Any] = {
        "name": source.label,
        "records": str(source.records.path),
        "images": str(source.images.root),
        "weight": source.weight,
        "samples": len(audit.lengths),
        "skipped": len(audit.skipped_samples),
        "skipped_fraction": audit.skipped_fraction,
        "images_per_sample": {str(n): c for n, c in sorted(Counter(images.tolist()).items())},
        "notes": dict(audit.notes),
        "skipped_samples": [
            {"index": sample.index, "reason": sample.reason} for sample in audit.skipped_samples
        ],
    }
    if encoding is not None:
        values |= _lengths(audit.lengths[used], images, audit.labels[used], encoding)
        values["markers_in_text"] = dict(audit.markers)
    return values


def data_report(summaries: Sequence[dict[str, Any]], encoding: Encoding | None) -> dict[str, Any]:
    """The whole report of ``validate --json``, which ``planning/samples/data_report.py`` reads.

    Returns:
        Counts, ``encoding``: what lengths depend on besides tokenizer and template (None without
        an encoding), and the summaries as ``sources``.
    """
    return {
        "samples": sum(values["samples"] for values in summaries),
        "skipped": sum(values["skipped"] for values in summaries),
        "encoding": encoding
        and {
            "sequence_length": encoding.sequence_length,
            "num_image_tokens": encoding.num_image_tokens,
        },
        "sources": list(summaries),
    }


def _lengths(
    lengths: np.ndarray, images: np.ndarray, labels: np.ndarray, encoding: Encoding
) -> dict[str, Any]:
    if not len(lengths):
        nothing = dict.fromkeys(("lengths", "images_each", "rows", "shapes"))
        return {**nothing, "image_tokens": 0, "label_tokens": 0}
    limit = encoding.sequence_length
    packed = rows_needed(lengths, limit)
    return {
        "lengths": {
            **quantiles(lengths),
            "total": int(lengths.sum(dtype=np.int64)),
            "sequence_length": limit,
            "beyond_sequence_length": float((lengths > limit).mean()),
        },
        "images_each": {**quantiles(images), "mean": float(images.mean())},
        "image_tokens": int(images.sum(dtype=np.int64)) * encoding.num_image_tokens,
        "label_tokens": int(labels.sum(dtype=np.int64)),
        "rows": {
            "one_sample_each": len(lengths),
            "packed": packed,
            "packed_fill": float(np.minimum(lengths, limit).sum(dtype=np.int64) / (packed * limit)),
        },
        "shapes": shape_histogram(lengths, images, labels, limit),
    }


def table(summaries: Sequence[dict[str, Any]]) -> Any:
    """The summaries as a table of rich, one row per source."""
    from rich.table import Table

    result = Table(
        "source",
        "samples",
        "skipped",
        "images",
        "image tokens",
        "length min/median/p99/max",
        "truncated",
        "rows packed",
    )
    for values in summaries:
        images = sum(int(n) * count for n, count in values["images_per_sample"].items())
        row = [values["name"], f"{values['samples']:,}", f"{values['skipped']:,}", f"{images:,}"]
        lengths, rows = values.get("lengths"), values.get("rows")
        if lengths and rows:
            quantiles = "/".join(f"{lengths[key]:,}" for key in ("min", "median", "p99", "max"))
            row += [f"{values['image_tokens']:,}", quantiles]
            row += [f"{lengths['beyond_sequence_length']:.2%}"]
            row += [f"{rows['packed']:,} ({rows['packed_fill']:.0%} full)"]
        result.add_row(*row)
    return result


def note_lines(summaries: Sequence[dict[str, Any]]) -> list[str]:
    """What is not used, and of how many records; one line per source that has any."""
    return [
        f"{values['name']}: "
        + ", ".join(f"{note} ({count:,})" for note, count in values["notes"].items())
        for values in summaries
        if values["notes"]
    ]


def packing_lines(summaries: Sequence[dict[str, Any]]) -> list[str]:
    """What packing would gain, one line per source with known lengths."""
    return [
        f"{values['name']}: packing puts {rows['one_sample_each']:,} samples into "
        f"{rows['packed']:,} rows of {values['lengths']['sequence_length']:,} tokens, "
        f"{rows['one_sample_each'] / rows['packed']:.1f} in a row"
        for values in summaries
        if (rows := values.get("rows"))
    ]


def truncation_lines(summaries: Sequence[dict[str, Any]]) -> list[str]:
    """How long rows would have to be, one line per source of which much is truncated."""
    return [
        f"{values['name']}: {lengths['beyond_sequence_length']:.1%} of the samples are truncated; "
        f"data.sequence_length={lengths['p99']} holds 99 % of them"
        for values in summaries
        if (lengths := values.get("lengths"))
        and lengths["beyond_sequence_length"] > _MANY_TRUNCATED
    ]


def image_fraction_lines(summaries: Sequence[dict[str, Any]]) -> list[str]:
    """The fraction of image tokens of an epoch, for the placement of experts; one line or none."""
    known = [values for values in summaries if values.get("shapes")]
    images = sum(values["weight"] * values["image_tokens"] for values in known)
    tokens = sum(values["weight"] * sum(values["shapes"]["tokens"]) for values in known)
    if not images:
        return []
    fraction = f"{images / tokens:.2f}"
    return [
        f"{images / tokens:.0%} of an epoch's tokens are image tokens: moe.image_fraction="
        f"{fraction}, if the experts cannot be placed evenly for any fraction"
    ]


def marker_lines(summaries: Sequence[dict[str, Any]]) -> list[str]:
    """Which sources have special tokens in the text of conversations, one line each."""
    return [
        f"{values['name']}: special tokens in the text, which become their ids "
        f"({', '.join(f'{marker} in {count:,}' for marker, count in found.items())} records); "
        "data.markers_in_text=text keeps them as text"
        for values in summaries
        if (found := values.get("markers_in_text"))
    ]
