"""The mapping between logical experts and their physical slots on expert-parallel ranks.

Image and text tokens come in unequal numbers, so the contiguous mapping (vision experts on the
first ranks, text experts on the last) loads ranks unequally.  The balanced mapping gives every
rank the same number of experts of every group, where the numbers allow it, and otherwise
minimizes the load of the most loaded rank.  Checkpoints store logical experts only, so they do
not depend on the placement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from moiie_megatron.layout.experts import ExpertLayout
from moiie_megatron.utils.errors import UserError

_MAX_NODES = 200_000  # of the search; the layouts of the paper need a few hundred


@dataclass(frozen=True)
class Placement:
    """Which logical expert is in which physical slot.

    Attributes:
        physical_to_logical: Logical expert id of each physical slot; with n slots per rank,
            rank r holds slots r * n to r * n + n - 1.
        ep_size: Number of expert-parallel ranks.
        imbalance: Load of the most loaded rank divided by the mean load, for the loads that the
            placement was computed from.
        balanced_for_any_fraction: Every rank holds the same number of experts of every group, so
            the load is even whatever the fraction of image tokens.
    """

    physical_to_logical: tuple[int, ...]
    ep_size: int
    imbalance: float
    balanced_for_any_fraction: bool

    @property
    def is_identity(self) -> bool:
        return self.physical_to_logical == tuple(range(len(self.physical_to_logical)))

    def describe(self, layout: ExpertLayout) -> str:
        """One line: the group of every slot by rank (V, S, T), and the remaining imbalance."""
        letters = [layout.name(expert)[0].upper() for expert in self.physical_to_logical]
        size = len(letters) // self.ep_size
        ranks = [" ".join(letters[i : i + size]) for i in range(0, len(letters), size)]
        balance = (
            "balanced for any fraction of image tokens"
            if self.balanced_for_any_fraction
            else f"most loaded rank at {self.imbalance:.2f} of the mean"
        )
        return f"{' | '.join(ranks)} ({balance})"


@lru_cache(maxsize=64)
def place_experts(
    kind: str,
    layout: ExpertLayout,
    ep_size: int,
    image_fraction: float,
    loads: tuple[float, ...] | None,
) -> Placement:
    """``balanced`` or ``contiguous`` by name; the search runs once for each set of arguments.

    Raises:
        UserError: See ``balanced``.
    """
    if kind == "contiguous":
        return contiguous(layout, ep_size, image_fraction)
    return balanced(layout, ep_size, image_fraction=image_fraction, loads=loads)


def contiguous(layout: ExpertLayout, ep_size: int, image_fraction: float = 0.5) -> Placement:
    """Megatron's placement: slot i holds logical expert i."""
    loads = expected_loads(layout, image_fraction)
    return _placement(layout, tuple(range(layout.num_experts)), ep_size, loads)


def balanced(
    layout: ExpertLayout,
    ep_size: int,
    *,
    image_fraction: float = 0.5,
    loads: Sequence[float] | None = None,
) -> Placement:
    """The placement with the most even load.

    Args:
        layout: The experts.
        ep_size: Number of expert-parallel ranks.
        image_fraction: Expected fraction of image tokens (0..1); used if ``loads`` is None.
        loads: Measured number of tokens of each logical expert; None assumes that every router
            chooses its experts uniformly.

    Raises:
        UserError: ``ep_size`` does not divide the number of experts.
        ValueError: There is not one load per expert.
    """
    if layout.num_experts % ep_size:
        raise UserError(
            f"parallel.expert is {ep_size} but there are {layout.num_experts} experts: use a "
            f"divisor of {layout.num_experts}."
        )
    if loads is not None and len(loads) != layout.num_experts:
        raise ValueError(f"{len(loads)} loads for {layout.num_experts} experts")
    used = expected_loads(layout, image_fraction) if loads is None else [float(x) for x in loads]
    groups = _groups(layout)
    if loads is None and all(len(group) % ep_size == 0 for group in groups):
        slots = tuple(
            expert
            for rank in range(ep_size)
            for group in groups
            for expert in group[rank * len(group) // ep_size : (rank + 1) * len(group) // ep_size]
        )
        return _placement(layout, slots, ep_size, used)
    ranks = _search(used, ep_size)
    found = _placement(layout, tuple(e for rank in ranks for e in sorted(rank)), ep_size, used)
    plain = _placement(layout, tuple(range(layout.num_experts)), ep_size, used)
    return plain if plain.imbalance <= found.imbalance + 1e-9 else found


def expected_loads(layout: ExpertLayout, image_fraction: float) -> list[float]:
    """Expected load of each logical expert if every router chooses its experts uniformly.

    The unit is assignments per token of the batch: the loads sum to ``top_k``.
    """
    loads = [0.0] * layout.num_experts
    fractions = {"joint": 1.0, "vision": image_fraction, "text": 1.0 - image_fraction}
    for router in layout.routers:
        ids = layout.allowed(router)
        for expert in ids:
            loads[expert] += fractions[router] * layout.top_k / len(ids)
    return loads


def _groups(layout: ExpertLayout) -> list[range]:
    shared_end = layout.num_vision + layout.num_shared
    return [
        range(layout.num_vision),
        range(layout.num_vision, shared_end),
        range(shared_end, layout.num_experts),
    ]


def _placement(
    layout: ExpertLayout,
    physical_to_logical: tuple[int, ...],
    ep_size: int,
    loads: Sequence[float],
) -> Placement:
    slots = physical_to_logical
    size = len(slots) // ep_size
    ranks = [slots[i : i + size] for i in range(0, len(slots), size)]
    totals = [sum(loads[expert] for expert in rank) for rank in ranks]
    mean = sum(totals) / ep_size
    counts = {tuple(len(set(group) & set(rank)) for group in _groups(layout)) for rank in ranks}
    return Placement(slots, ep_size, max(totals) / mean if mean else 1.0, len(counts) == 1)


def _search(loads: Sequence[float], ep_size: int) -> list[list[int]]:
    """The experts of each rank, equal in number, with the smallest maximum load of a rank.

    Branch and bound: the most loaded expert is assigned first, to the least loaded rank first, so
    that the first solution is the greedy one and the search only improves on it.
    """
    size = len(loads) // ep_size
    heaviest_first = sorted(range(len(loads)), key=lambda expert: (-loads[expert], expert))
    ranks: list[list[int]] = [[] for _ in range(ep_size)]
    totals = [0.0] * ep_size
    floor = sum(loads) / ep_size
    best: list[list[int]] = []
    best_peak = float("inf")
    nodes = 0

    def visit(depth: int) -> None:
        nonlocal best, best_peak, nodes
        nodes += 1
        if depth == len(heaviest_first):
            best, best_peak = [list(rank) for rank in ranks], max(totals)
            return
        expert = heaviest_first[depth]
        tried: set[tuple[float, int]] = set()
        for rank in sorted(range(ep_size), key=lambda r: (totals[r], r)):
            state = (round(totals[rank], 12), len(ranks[rank]))
            total = totals[rank] + loads[expert]
            # Ranks with the same load and number of experts lead to the same solutions.
            if len(ranks[rank]) == size or state in tried or total >= best_peak - 1e-12:
                continue
            tried.add(state)
            ranks[rank].append(expert)
            totals[rank] = total
            visit(depth + 1)
            ranks[rank].pop()
            totals[rank] = total - loads[expert]
            if best_peak <= floor + 1e-12 or nodes > _MAX_NODES:
                return

    visit(0)
    return best
