"""A routing record as named numbers, for curves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moiie_megatron.layout.token_types import MODALITIES


def routing_scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a routing record (``record.py``) that are worth a curve, by name."""
    return dict(_scalars(record))


def _scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    experts = record["experts"]
    for number, layer in record["layers"].items():
        label = f"layer_{int(number):02d}"
        for modality in MODALITIES:
            part = layer[modality]
            if not part["tokens"]:
                continue
            yield f"load_entropy_{modality}/{label}", part["entropy"]
            for name, fraction in zip(experts, part["fraction"], strict=True):
                if name.split(".")[0] in (modality, "shared"):
                    yield f"expert_fraction_{modality}/{label}/{name}", fraction
        if layer["max_over_mean"] is not None:
            yield f"rank_load_max_over_mean/{label}", layer["max_over_mean"]
        yield f"dead_experts/{label}", len(layer["dead"])
    for kind, moved in record["moved"].items():
        yield f"dispatched_bytes/{kind}", moved["bytes"]
