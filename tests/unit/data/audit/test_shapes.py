"""Histograms of samples: by hand, and with the sums of any data."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moiie_megatron.data.audit.shapes import quantiles, shape_histogram


def test_a_histogram_by_hand() -> None:
    """The last two samples are truncated to 8 tokens."""
    lengths = np.array([3, 5, 5, 5, 8, 9])
    images = np.array([0, 1, 0, 1, 1, 1])
    labels = np.array([1, 2, 4, 3, 2, 1])
    assert shape_histogram(lengths, images, labels, 8) == {
        "images": [0, 0, 1, 1],
        "samples": [1, 1, 2, 2],
        "tokens": [3, 5, 10, 16],
        "labels": [1, 4, 5, 3],
        "most_labels": [1, 4, 3, 2],
    }


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(1, 99), st.integers(0, 3), st.integers(0, 5)), min_size=1),
    st.integers(1, 80),
    st.integers(1, 20),
)
def test_sums_are_those_of_the_samples(
    samples: list[tuple[int, int, int]], limit: int, buckets: int
) -> None:
    lengths, images, labels = np.array(samples).T
    columns = shape_histogram(lengths, images, labels, limit, buckets)
    found = {name: np.array(column) for name, column in columns.items()}
    short = np.minimum(lengths, limit)
    assert found["samples"].sum() == len(samples)
    assert found["tokens"].sum() == short.sum()
    assert found["labels"].sum() == labels.sum()
    assert (found["images"] * found["samples"]).sum() == images.sum()
    assert found["most_labels"].max() == labels.max()
    assert len(found["samples"]) <= 4 * min(buckets, limit)
    # Samples of a bucket are at most its width apart.
    means = found["tokens"] / found["samples"]
    width = -(-limit // buckets)
    for length, number in zip(short, images, strict=True):
        assert np.abs(means[found["images"] == number] - length).min() < width


def test_quantiles_are_values() -> None:
    found = quantiles(np.arange(1, 201))
    assert found == {"min": 1, "median": 100, "p99": 198, "max": 200}
