"""How many samples of each length and number of images a source has: what planning needs of it.

The histogram has at most ``BUCKETS`` times the largest number of images entries, however many
samples there are.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

BUCKETS: Final = 4096  # of lengths; up to this sequence length every length has its own


def shape_histogram(
    lengths: np.ndarray,
    images: np.ndarray,
    labels: np.ndarray,
    sequence_length: int,
    buckets: int = BUCKETS,
) -> dict[str, list[int]]:
    """Count samples that are alike.

    Args:
        lengths: int (r,), tokens of every sample before truncation, at least 1; r is 1 or more.
        images: int (r,), images of every sample.
        labels: int (r,), tokens with a label of every sample, after truncation.
        sequence_length: Longer samples are truncated.
        buckets: Number of ranges that lengths are divided into.

    Returns:
        Columns with one entry per bucket of lengths and number of images, in their order:
        ``images`` of each sample, the number of ``samples``, their ``tokens`` after truncation and
        their ``labels`` in all, and ``most_labels``, the largest number of labels of one of them.
    """
    lengths = np.minimum(lengths, sequence_length).astype(np.int64)
    width = -(-sequence_length // buckets)
    base = int(images.max()) + 1
    keys = (lengths - 1) // width * base + images
    entries, entry, samples = np.unique(keys, return_inverse=True, return_counts=True)
    tokens, label_totals, most_labels = (np.zeros(len(entries), np.int64) for _ in range(3))
    np.add.at(tokens, entry, lengths)
    np.add.at(label_totals, entry, labels)
    np.maximum.at(most_labels, entry, labels)
    columns = {
        "images": entries % base,
        "samples": samples,
        "tokens": tokens,
        "labels": label_totals,
        "most_labels": most_labels,
    }
    return {name: column.tolist() for name, column in columns.items()}


def quantiles(values: np.ndarray) -> dict[str, Any]:
    """``min``, ``median``, ``p99`` and ``max`` of integers, at least one; all are among them."""
    return {
        "min": int(values.min()),
        "median": int(np.quantile(values, 0.5, method="lower")),
        "p99": int(np.quantile(values, 0.99, method="lower")),
        "max": int(values.max()),
    }
