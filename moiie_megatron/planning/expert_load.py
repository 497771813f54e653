"""Rows that experts compute and that travel between expert-parallel ranks, in expectation.

Shape letters: see ``moe/__init__.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.layout.placement import Placement
from moiie_megatron.layout.token_types import MODALITIES
from moiie_megatron.planning.routing import RoutingAssumption
from moiie_megatron.planning.samples.drawn_steps import DrawnSteps
from moiie_megatron.planning.top_k_choice import top_k_choice
from moiie_megatron.planning.workload import MicroBatchShape

QUANTILE: Final = 0.99


@dataclass(frozen=True)
class RoutedTokens:
    """Tokens by the experts that they may use.

    Attributes:
        vision: Image tokens.
        text: Text tokens and padding, which is routed like text.
    """

    vision: float
    text: float

    @property
    def image_fraction(self) -> float:
        return self.vision / (self.vision + self.text)

    @classmethod
    def of(cls, micro_batches: Iterable[MicroBatchShape], config: RunConfig) -> RoutedTokens:
        """Those of some micro-batches together."""
        found = list(micro_batches)
        images = sum(one.images for one in found)
        as_text = images if config.moe.last_image_token_as_text else 0
        vision = images * config.vision.num_image_tokens - as_text
        return cls(vision, sum(one.positions for one in found) - vision)


@dataclass(frozen=True, eq=False)
class ExpertLoad:
    """What one layer does with the tokens of a group of expert-parallel ranks.

    Attributes:
        experts_NL: Rows that each local expert of each rank computes, in physical order.
        rows_NN: Rows that go from each rank (first axis) to each rank, those that stay included.
    """

    experts_NL: np.ndarray
    rows_NN: np.ndarray

    @property
    def ranks_N(self) -> np.ndarray:
        """Rows that the experts of each rank compute."""
        return np.asarray(self.experts_NL.sum(axis=1))

    @property
    def max_over_mean(self) -> float:
        """Of the rows that ranks compute; 1 without rows."""
        mean = self.ranks_N.mean()
        return float(self.ranks_N.max() / mean) if mean else 1.0

    @property
    def received_N(self) -> np.ndarray:
        """Rows that each rank holds after the dispatch, its own included."""
        return np.asarray(self.rows_NN.sum(axis=0))

    @property
    def sent_N(self) -> np.ndarray:
        """Rows that each rank sends to others."""
        return np.asarray(self.rows_NN.sum(axis=1) - np.diag(self.rows_NN))


@dataclass(frozen=True)
class LoadRange:
    """The load of the most loaded rank of a group in one layer, over many micro-batches.

    Loads are rows that a rank computes in one micro-batch.

    Attributes:
        layer: Index of the decoder layer, from 0.
        mean: Load of the most loaded rank, on average over micro-batches.
        quantile: The load that ``QUANTILE`` of the micro-batches do not exceed on any rank.
        most: The largest load in any of them.
        max_over_mean: Load of the most loaded rank divided by the mean of the ranks, where the
            load is summed over all micro-batches.
        most_over_mean: The largest of that in any one micro-batch.
        all_images: Load of the most loaded rank if all tokens of the group were image tokens.
        all_text: The same if all were text.
        tokens: Those tokens: what a group dispatches at most, padding included.
    """

    layer: int
    mean: float
    quantile: float
    most: float
    max_over_mean: float
    most_over_mean: float
    all_images: float
    all_text: float
    tokens: float


def expert_load(
    routing: RoutingAssumption,
    layer: int,
    placement: Placement,
    tokens: Sequence[RoutedTokens],
    dispatcher: str,
) -> ExpertLoad:
    """The expected rows of one layer.

    Args:
        routing: Loads of experts.
        layer: Index of the decoder layer, from 0.
        placement: Which rank has which expert.
        tokens: Of every rank of the group, as it dispatches them.
        dispatcher: ``moe.dispatcher``.
    """
    assert len(tokens) == placement.ep_size, (len(tokens), placement.ep_size)
    tokens_NM = np.array([[one.vision, one.text] for one in tokens])
    loads_MP = _loads(routing, layer, placement)
    experts_P = tokens_NM.sum(axis=0) @ loads_MP
    rows_MN = rows_per_token(routing, layer, placement, dispatcher)
    return ExpertLoad(experts_P.reshape(placement.ep_size, -1), tokens_NM @ rows_MN)


def rows_per_token(
    routing: RoutingAssumption, layer: int, placement: Placement, dispatcher: str
) -> np.ndarray:
    """Expected rows that a token of each modality becomes on each expert-parallel rank, (M, N).

    The rule is that of ``moe/dispatcher.py``, ``rows_by_rank``: ``alltoall`` sends a token once per
    expert, ``moiie`` and ``flex`` once to every rank that holds one of its experts, ``allgather``
    once to every rank.  Where a rank has several experts, how many of them a token chooses together
    follows from the loads by ``TopKChoice``.
    """
    ranks = placement.ep_size
    if dispatcher == "allgather":
        return np.ones((len(MODALITIES), ranks))
    loads_MP = _loads(routing, layer, placement)
    if dispatcher == "alltoall":
        return np.asarray(loads_MP.reshape(len(MODALITIES), ranks, -1).sum(axis=2))
    size = len(placement.physical_to_logical) // ranks
    slots = np.arange(ranks * size).reshape(ranks, size)
    choices = [top_k_choice(tuple(loads_P.tolist())) for loads_P in loads_MP]
    return np.array([[choice.any_of(own) for own in slots] for choice in choices])


def load_range(
    routing: RoutingAssumption, layer: int, placement: Placement, groups: Sequence[RoutedTokens]
) -> LoadRange:
    """How the load of the most loaded rank varies with the image fraction of micro-batches.

    Args:
        routing: Loads of experts.
        layer: Index of the decoder layer, from 0.
        placement: Which rank has which expert.
        groups: Tokens of a group of expert-parallel ranks in every micro-batch
            (``group_tokens``).
    """
    rows_MN = rows_per_token(routing, layer, placement, "alltoall")  # one per expert
    tokens_GM = np.array([[one.vision, one.text] for one in groups])
    ranks_GN = tokens_GM @ rows_MN
    most_G = ranks_GN.max(axis=1)
    largest = float(tokens_GM.sum(axis=1).max())
    total_N = ranks_GN.sum(axis=0)
    return LoadRange(
        layer=layer,
        mean=float(most_G.mean()),
        quantile=float(np.quantile(most_G, QUANTILE, method="inverted_cdf")),
        most=float(most_G.max()),
        max_over_mean=float(total_N.max() / total_N.mean()),
        most_over_mean=float((most_G / ranks_GN.mean(axis=1)).max()),
        all_images=largest * float(rows_MN[0].max()),
        all_text=largest * float(rows_MN[1].max()),
        tokens=largest,
    )


def group_tokens(config: RunConfig, drawn: DrawnSteps) -> list[RoutedTokens]:
    """The tokens that a group of expert-parallel ranks dispatches together, for all micro-batches.

    The ranks of a group run the same micro-batch number at the same time.  In Megatron's order,
    neighbours are first tensor-parallel, then data-parallel ranks: a group has the micro-batches
    of ``expert * expert_tensor / tensor`` data-parallel ranks, or a part of one.
    """
    parallel = config.active_parallel
    together = max(1, parallel.expert * parallel.expert_tensor // parallel.tensor)
    part = min(1.0, parallel.expert * parallel.expert_tensor / parallel.tensor)
    found = []
    for step in drawn.steps:
        for first in range(0, len(step), together):
            ranks = step[first : first + together]
            for number in range(len(ranks[0])):
                whole = RoutedTokens.of([own[number] for own in ranks], config)
                found.append(RoutedTokens(whole.vision * part, whole.text * part))
    return found


def _loads(routing: RoutingAssumption, layer: int, placement: Placement) -> np.ndarray:
    """Loads by modality and physical slot, (M, P)."""
    slots = list(placement.physical_to_logical)
    return np.array([routing.loads(layer, modality) for modality in MODALITIES])[:, slots]
