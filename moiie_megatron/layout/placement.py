"""Where experts live: the physical order of the logical experts over expert-parallel ranks.

Image and text tokens come in unequal numbers, so the contiguous order (vision experts on the
first ranks, text experts on the last) loads ranks unequally.  Experts are therefore laid out so
that every rank holds an equal share of every group, where the numbers allow, and otherwise so
that the fullest rank is as little above the mean as possible.  Checkpoints know logical experts
only: a placement never changes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moiie_megatron.layout.experts import ExpertLayout
from moiie_megatron.utils.errors import UserError

_MAX_NODES = 200_000  # of the search; the layouts of the paper need a few hundred


@dataclass(frozen=True)
class Placement:
    """Which logical expert sits at which physical place.

    Attributes:
        order: Logical id by physical place; rank r holds places r * n to r * n + n - 1.
        ep_size: Expert-parallel ranks.
        imbalance: Load of the fullest rank over the mean, for the loads it was made for.
        balanced_for_any_share: Every rank holds an equal share of every group.
    """

    order: tuple[int, ...]
    ep_size: int
    imbalance: float
    balanced_for_any_fraction: bool

    @property
    def is_identity(self) -> bool:
        return self.order == tuple(range(len(self.order)))

    def describe(self, layout: ExpertLayout) -> str:
        """One line: the groups by rank and the imbalance that remains."""
        letters = [layout.name(expert)[0].upper() for expert in self.order]
        size = len(self.order) // self.ep_size
        ranks = [" ".join(letters[i : i + size]) for i in range(0, len(letters), size)]
        rest = (
            "balanced for any share of image tokens"
            if self.balanced_for_any_fraction
            else f"fullest rank at {self.imbalance:.2f} of the mean"
        )
        return f"{' | '.join(ranks)} ({rest})"


def contiguous(layout: ExpertLayout, ep_size: int, image_fraction: float = 0.5) -> Placement:
    """Megatron's order: logical ids in a row."""
    loads = expected_loads(layout, image_fraction)
    return _placement(layout, tuple(range(layout.num_experts)), ep_size, loads)


def balanced(
    layout: ExpertLayout,
    ep_size: int,
    *,
    image_fraction: float = 0.5,
    loads: Sequence[float] | None = None,
) -> Placement:
    """The most even placement.

    Args:
        image_fraction: Share of image tokens (0..1), if no loads were measured.
        loads: Measured tokens by logical expert; otherwise uniform choice within each router.

    Raises:
        UserError: ``ep_size`` does not divide the experts.
        ValueError: The loads are of another number.
    """
    if layout.num_experts % ep_size:
        raise UserError(
            f"parallel.expert is {ep_size} but there are {layout.num_experts} experts: use a "
            "divisor."
        )
    if loads is not None and len(loads) != layout.num_experts:
        raise ValueError(
            f"There are {len(loads)} loads for {layout.num_experts} experts: give one per expert."
        )
    used = expected_loads(layout, image_fraction) if loads is None else [float(x) for x in loads]
    groups = _groups(layout)
    if loads is None and all(len(group) % ep_size == 0 for group in groups):
        order = tuple(
            expert
            for rank in range(ep_size)
            for group in groups
            for expert in group[rank * len(group) // ep_size : (rank + 1) * len(group) // ep_size]
        )
        return _placement(layout, order, ep_size, used)
    ranks = _search(used, ep_size)
    found = _placement(layout, tuple(e for rank in ranks for e in sorted(rank)), ep_size, used)
    plain = _placement(layout, tuple(range(layout.num_experts)), ep_size, used)
    return plain if plain.imbalance <= found.imbalance + 1e-9 else found


def expected_loads(layout: ExpertLayout, image_fraction: float) -> list[float]:
    """Load by logical expert, in experts per token, if every router chooses uniformly."""
    loads = [0.0] * layout.num_experts
    shares = {"joint": 1.0, "vision": image_fraction, "text": 1.0 - image_fraction}
    for router in layout.routers:
        ids = layout.allowed(router)
        for expert in ids:
            loads[expert] += shares[router] * layout.top_k / len(ids)
    return loads


def _groups(layout: ExpertLayout) -> list[range]:
    shared_end = layout.num_vision + layout.num_shared
    return [
        range(layout.num_vision),
        range(layout.num_vision, shared_end),
        range(shared_end, layout.num_experts),
    ]


def _placement(
    layout: ExpertLayout, order: tuple[int, ...], ep_size: int, loads: Sequence[float]
) -> Placement:
    size = len(order) // ep_size
    ranks = [order[i : i + size] for i in range(0, len(order), size)]
    totals = [sum(loads[expert] for expert in rank) for rank in ranks]
    mean = sum(totals) / ep_size
    counts = {tuple(len(set(group) & set(rank)) for group in _groups(layout)) for rank in ranks}
    return Placement(order, ep_size, max(totals) / mean if mean else 1.0, len(counts) == 1)


def _search(loads: Sequence[float], ep_size: int) -> list[list[int]]:
    """Equal numbers of experts per rank with the smallest fullest rank (branch and bound).

    Experts go heaviest first to the emptiest rank first, so the first leaf is the greedy answer
    and the search only improves on it.
    """
    size = len(loads) // ep_size
    heaviest_first = sorted(range(len(loads)), key=lambda expert: (-loads[expert], expert))
    ranks: list[list[int]] = [[] for _ in range(ep_size)]
    totals = [0.0] * ep_size
    floor = sum(loads) / ep_size
    best: list[list[int]] = []
    best_peak = float("inf")
    nodes = 0

    def visit(place: int) -> None:
        nonlocal best, best_peak, nodes
        nodes += 1
        if place == len(heaviest_first):
            best, best_peak = [list(rank) for rank in ranks], max(totals)
            return
        expert = heaviest_first[place]
        tried: set[tuple[float, int]] = set()
        for rank in sorted(range(ep_size), key=lambda r: (totals[r], r)):
            state = (round(totals[rank], 12), len(ranks[rank]))
            total = totals[rank] + loads[expert]
            # Ranks that look alike lead to the same answers.
            if len(ranks[rank]) == size or state in tried or total >= best_peak - 1e-12:
                continue
            tried.add(state)
            ranks[rank].append(expert)
            totals[rank] = total
            visit(place + 1)
            ranks[rank].pop()
            totals[rank] = total - loads[expert]
            if best_peak <= floor + 1e-12 or nodes > _MAX_NODES:
                return

    visit(0)
    return best
