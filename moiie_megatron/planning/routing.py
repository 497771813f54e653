"""How often each expert is expected to be chosen: an assumption, or what a run did.

All numbers are probabilities per token and by logical expert, so they hold for any placement and
any parallel layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import numpy as np

from moiie_megatron.layout.experts import ExpertLayout
from moiie_megatron.layout.placement import Placement
from moiie_megatron.layout.token_types import MODALITIES
from moiie_megatron.routing_stats.expert_use import ExpertUse
from moiie_megatron.routing_stats.reading import newest, read_routing
from moiie_megatron.utils.errors import UserError

Modality = Literal["vision", "text"]

# By modality: for every logical expert the probability that it is one of a token's top-k.
Loads = Mapping[Modality, tuple[float, ...]]

_SLACK: Final = 1e-6  # of sums of counts that were divided
_LAST_STEPS: Final = 50  # as in the figures of routing: what routers do now, not at the start


@dataclass(frozen=True)
class RoutingAssumption:
    """The expected load of every expert; a dense layout has none.

    Attributes:
        layout: Which experts exist.
        everywhere: The loads of layers that ``by_layer`` does not name; None if there are none.
        origin: Where the numbers come from, as a phrase for tables: "balanced routing".
        by_layer: Loads by decoder layer, from 0.
    """

    layout: ExpertLayout
    everywhere: Loads | None
    origin: str
    by_layer: Mapping[int, Loads] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for loads in [*filter(None, [self.everywhere]), *self.by_layer.values()]:
            for modality in MODALITIES:
                problem = _problem(self.layout, modality, loads[modality])
                assert problem is None, (modality, problem)

    def loads(self, layer: int, modality: Modality) -> tuple[float, ...]:
        """For every logical expert the probability that it is one of a token's top-k.

        They add up to ``layout.top_k``, and are 0 for experts that the modality may not use.

        Args:
            layer: Index of the decoder layer, from 0, with experts.
            modality: Of the token; padding is routed like text.

        Raises:
            KeyError: The loads of that layer are not known.
        """
        loads = self.by_layer.get(layer, self.everywhere)
        if loads is None:
            raise KeyError(layer)
        return loads[modality]


def balanced(layout: ExpertLayout) -> RoutingAssumption:
    """Every router chooses its experts evenly: what the load-balancing losses aim at."""
    loads = {modality: _even(layout, modality) for modality in MODALITIES}
    return RoutingAssumption(layout, loads, "balanced routing")


def skewed(
    layout: ExpertLayout, factor: float, placement: Placement, image_fraction: float
) -> RoutingAssumption:
    """One expert of each modality gets more than the others, which get the rest evenly.

    It is the worst choice for the placement: that which gives the most loaded expert-parallel
    rank the most, and among equals the one that gives one expert the most (a shared expert that
    both modalities prefer), then the lowest ids.

    Args:
        layout: Which experts exist.
        factor: Load of the preferred expert divided by its balanced load, 1 or more; the load is
            at most 1 per token, however large the factor.
        placement: Which rank has which expert.
        image_fraction: Fraction of image tokens, 0..1, which decides what is worst.

    Raises:
        UserError: A factor below 1.
    """
    if not factor >= 1:  # NaN too
        raise UserError(f"The routing skew is {factor:g}: use 1 (balanced) or more.")
    choices = {
        modality: [_preferring(layout, modality, e, factor) for e in layout.allowed(modality)]
        for modality in MODALITIES
    }
    fractions = dict(zip(MODALITIES, (image_fraction, 1 - image_fraction), strict=True))
    vision_VE, text_TE = (fractions[m] * np.array(choices[m]) for m in MODALITIES)
    loads_VTE = vision_VE[:, None] + text_TE[None]
    slots = loads_VTE[:, :, list(placement.physical_to_logical)]
    ranks = slots.reshape(*slots.shape[:2], placement.ep_size, -1).sum(axis=-1).max(axis=-1)
    of_expert = loads_VTE.max(axis=-1)
    # Rounded, because sums in another order differ in the last digits.
    order = np.lexsort([-of_expert.round(9).ravel(), -ranks.round(9).ravel()])
    vision, text = np.unravel_index(int(order[0]), ranks.shape)
    loads: Loads = {"vision": choices["vision"][vision], "text": choices["text"][text]}
    return RoutingAssumption(
        layout, loads, f"most used expert of each modality at {factor:g} times its balanced load"
    )


def replayed(
    path: str | Path, layout: ExpertLayout, layers: Sequence[int], *, last: int = _LAST_STEPS
) -> RoutingAssumption:
    """What the routers of a run did.

    A modality that had no token in the file is taken as balanced, which ``origin`` says.

    Args:
        path: Its ``routing.jsonl`` (``routing_stats/record.py``).
        layout: The experts that are planned, which must be those of the run.
        layers: The layers that are planned, from 0; the run must have experts there.
        last: Number of final optimizer steps to add up.

    Raises:
        UserError: The file cannot be read, is no file of routing records, or is about other
            experts or layers.
    """
    records = newest(read_routing(path), last)
    use = ExpertUse.from_records(records)
    names = tuple(layout.name(expert) for expert in range(layout.num_experts))
    advice = "name the routing.jsonl of a run of the same model"
    if (use.experts, use.top_k) != (names, layout.top_k):
        raise UserError(
            f"{path} is about {len(use.experts)} experts ({', '.join(use.experts)}) with top-k "
            f"{use.top_k}, the configuration has {layout.num_experts} ({', '.join(names)}) with "
            f"{layout.top_k}: {advice}."
        )
    if missing := sorted(set(layers) - set(use.layers)):
        raise UserError(
            f"{path} has no record of layer {missing[0]}, only of {_listed(use.layers)}: {advice}."
        )
    absent = [modality for modality in MODALITIES if modality not in use.present()]
    by_layer: dict[int, Loads] = {}
    for layer in layers:
        loads: dict[Modality, tuple[float, ...]] = {}
        for modality in MODALITIES:
            found = tuple(use.fractions[modality][layer].tolist())
            loads[modality] = found if any(found) else _even(layout, modality)
            problem = _problem(layout, modality, loads[modality])
            if problem is not None:
                raise UserError(
                    f"{path} has {problem} for {modality} tokens in layer {layer}: {advice}."
                )
        by_layer[layer] = loads
    origin = f"routing of {Path(path).name}"
    origin += f", {absent[0]} tokens balanced because the run had none" if absent else ""
    return RoutingAssumption(layout, None, origin, by_layer)


def _even(layout: ExpertLayout, modality: Modality) -> tuple[float, ...]:
    allowed = layout.allowed(modality)
    load = layout.top_k / len(allowed) if len(allowed) else 0.0
    return tuple(load if expert in allowed else 0.0 for expert in range(layout.num_experts))


def _preferring(
    layout: ExpertLayout, modality: Modality, preferred: int, factor: float
) -> tuple[float, ...]:
    loads = list(_even(layout, modality))
    allowed = layout.allowed(modality)
    loads[preferred] = min(1.0, factor * loads[preferred])
    for other in allowed:
        if other != preferred:
            loads[other] = (layout.top_k - loads[preferred]) / (len(allowed) - 1)
    return tuple(loads)


def _problem(layout: ExpertLayout, modality: Modality, loads: Sequence[float]) -> str | None:
    """What is wrong with the loads of one modality; None if nothing is."""
    allowed = layout.allowed(modality)
    if len(loads) != layout.num_experts:
        return f"{len(loads)} loads"
    if any(load > _SLACK for expert, load in enumerate(loads) if expert not in allowed):
        return "a load of an expert that they may not use"
    if not all(-_SLACK <= load <= 1 + _SLACK for load in loads):
        return "a load above 1 per token"
    top_k = 0 if layout.is_dense else layout.top_k
    if abs(sum(loads) - top_k) > _SLACK * max(layout.num_experts, 1):
        return f"loads that add up to {sum(loads):g}"
    return None


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
