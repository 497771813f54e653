"""Are two models the same, tensor by tensor?  Any two formats, under one naming.

Both sides are at hand, so their bytes are compared: that says what equal digests would, and where
they differ also by how much.  Where one side has an FFN and the other experts, every expert is
compared with the FFN: equal is what upcycling makes them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moiie_megatron.convert.open_model import Key, Weights
from moiie_megatron.families import weight_map
from moiie_megatron.utils.digest import same_bytes
from moiie_megatron.utils.progress import ProgressCounter, ProgressFn

_DENSE_FFN = ".mlp.linear_fc1.weight"
_BLOCK = 1 << 24  # values that are subtracted at a time


@dataclass(frozen=True)
class Mismatch:
    """A tensor that is not the same on both sides.

    Args:
        name: Megatron name, of an expert with the expert's own: ``... [vision.0]``.
        shape_a: In the first model; None where only the other has it.
        shape_b: The same for the second model.
        difference: Largest absolute difference; None where there is nothing to subtract.
    """

    name: str
    shape_a: tuple[int, ...] | None
    shape_b: tuple[int, ...] | None
    difference: float | None = None


@dataclass
class TensorReport:
    """The outcome of ``compare_tensors``.

    Args:
        compared: Pairs that were compared; an FFN counts once for every expert.
        dense_pairs: Of them, experts and an FFN.
        other_dtype: Of them, equal values in different dtypes.
        skipped: What only one side has by nature: part -> tensors.
        mismatches: Pairs that differ, and what only one side has without such a reason.
    """

    compared: int = 0
    dense_pairs: int = 0
    other_dtype: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    mismatches: list[Mismatch] = field(default_factory=list)

    @property
    def is_equal(self) -> bool:
        """Something was compared, and nothing differs."""
        return self.compared > 0 and not self.mismatches

    def lines(self, limit: int = 20) -> list[str]:
        """For people; at most ``limit`` mismatches."""
        alone = sum(None in (m.shape_a, m.shape_b) for m in self.mismatches)
        equal = self.compared - (len(self.mismatches) - alone)
        lines = [f"tensors: {self.compared} compared, {equal} equal"]
        if self.other_dtype:
            lines.append(f"  {self.other_dtype} of them equal in value, stored in another dtype")
        if self.dense_pairs:
            lines.append(f"  {self.dense_pairs} of them an expert compared with the dense FFN")
        for part, count in self.skipped.items():
            lines.append(f"  skipped: {part}, {count} tensors")
        if self.mismatches:
            lines.append(f"  {'max |difference|':<17} {'shape in A':<16} {'shape in B':<16} name")
        for m in self.mismatches[:limit]:
            difference = "-" if m.difference is None else f"{m.difference:.3e}"
            shapes = f"{_text(m.shape_a):<16} {_text(m.shape_b):<16}"
            lines.append(f"  {difference:<17} {shapes} {m.name}")
        if len(self.mismatches) > limit:
            lines.append(f"  ... and {len(self.mismatches) - limit} more")
        return lines


def compare_tensors(a: Weights, b: Weights, progress: ProgressFn | None = None) -> TensorReport:
    """Compare all tensors of two models, one pair in memory at a time.

    Routers where the other side has a dense FFN, and vision tower and connector where the other
    side is a language model alone, are skipped; anything else that only one side has is a
    mismatch.

    Args:
        progress: Told about every pair.

    Raises:
        UserError: A tensor that cannot be read.
    """
    report = TensorReport()
    pairs = list(_pairs(a, b, report.skipped))
    sizes = [
        next(side.info(*key).num_bytes for side, key in ((a, x), (b, y)) if key is not None)
        for x, y in pairs
    ]
    sides = (_Side(a), _Side(b))
    counter = ProgressCounter(sum(sizes), progress)
    for (of_a, of_b), size in zip(pairs, sizes, strict=True):
        name = _label(a, of_a, b, of_b)
        if of_a is None or of_b is None:
            report.mismatches.append(Mismatch(name, sides[0].shape(of_a), sides[1].shape(of_b)))
        else:
            report.compared += 1
            report.dense_pairs += of_a[1] != of_b[1]
            _compare(report, name, sides[0].get(of_a), sides[1].get(of_b))
        counter.add(size)
    return report


def _compare(report: TensorReport, name: str, x: Tensor, y: Tensor) -> None:
    if same_bytes(x, y):
        return
    difference = _difference(x, y) if x.shape == y.shape else None
    if difference == 0 and x.dtype != y.dtype:
        report.other_dtype += 1
    else:
        report.mismatches.append(Mismatch(name, tuple(x.shape), tuple(y.shape), difference))


def _difference(x: Tensor, y: Tensor) -> float:
    """The largest one; NaN where one side has one."""
    worst = torch.zeros(())
    blocks = zip(x.reshape(-1).split(_BLOCK), y.reshape(-1).split(_BLOCK), strict=True)
    for of_x, of_y in blocks:
        worst = torch.maximum(worst, (of_x.float() - of_y.float()).abs().max())  # keeps NaN
    return worst.item()


class _Side:
    """Keeps the last tensor: an FFN stays for all experts that it is compared with."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._last: tuple[Key, Tensor] | None = None

    def shape(self, key: Key | None) -> tuple[int, ...] | None:
        return None if key is None else self._weights.info(*key).shape

    def get(self, key: Key) -> Tensor:
        if self._last is None or self._last[0] != key:
            self._last = None  # let go of it before the next is read
            self._last = (key, self._weights.get(*key))
        return self._last[1]


def _pairs(
    a: Weights, b: Weights, skipped: Counter[str]
) -> Iterator[tuple[Key | None, Key | None]]:
    """What is compared with what; None where the other side has nothing for it."""
    of_a, of_b = set(a.keys), set(b.keys)
    # Dense tensors that are met as the counterparts of experts.
    expanded_a, expanded_b = (
        {_dense(key) for key in keys if _dense(key) != key} for keys in (of_a, of_b)
    )
    for key in a.keys:
        other = _counterpart(key, of_b)
        if other is not None:
            yield key, other
        elif key not in expanded_b and not _is_skipped(key, of_b, skipped):
            yield key, None
    for key in b.keys:
        other = _counterpart(key, of_a)
        if other is not None and other != key:  # equal keys were met above
            yield other, key
        elif other is None and key not in expanded_a and not _is_skipped(key, of_a, skipped):
            yield None, key


def _dense(key: Key) -> Key:
    """What the tensor is upcycled from in a dense model: itself outside MoE layers."""
    return weight_map.dense_name(key[0]), None


def _counterpart(key: Key, others: set[Key]) -> Key | None:
    return next((found for found in (key, _dense(key)) if found in others), None)


def _is_skipped(key: Key, others: set[Key], skipped: Counter[str]) -> bool:
    """Whether the other side lacks the tensor by nature; counts it then."""
    name, part = key[0], None
    if weight_map.ROUTER in name and (name.partition(".mlp.")[0] + _DENSE_FFN, None) in others:
        part = "routers (the other model has a dense FFN there)"
    for prefix, what in ((weight_map.VISION, "vision tower"), (weight_map.CONNECTOR, "connector")):
        if name.startswith(prefix) and not any(other.startswith(prefix) for other, _ in others):
            part = f"{what} (the other model has none)"
    if part is not None:
        skipped[part] += 1
    return part is not None


def _label(a: Weights, of_a: Key | None, b: Weights, of_b: Key | None) -> str:
    """The Megatron name, and the expert's own where either side has an expert there."""
    for weights, key in ((a, of_a), (b, of_b)):
        if key is not None and key[1] is not None:
            return f"{key[0]} [{weights.experts[key[1]]}]"
    key = of_a or of_b
    assert key is not None
    return key[0]


def _text(shape: tuple[int, ...] | None) -> str:
    return "-" if shape is None else str(shape)
