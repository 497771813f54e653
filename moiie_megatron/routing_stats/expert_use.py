"""How much each modality used each expert, added up over routing records.

Shape letters: see ``moe/__init__.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moiie_megatron.layout.token_types import MODALITIES
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.jsonl import Records

MODALITY_TITLES: Mapping[str, str] = {"vision": "image tokens", "text": "text tokens"}


@dataclass(frozen=True)
class ExpertUse:
    """Routing of one model over some steps or samples.

    Attributes:
        experts: Names by logical id (``vision.0``, ``shared.1``).
        top_k: Experts per token.
        fractions: By modality and layer (from 0): fraction of the modality's tokens that each
            expert got, ``(E,)``; adds up to ``top_k``, or to 0 where the modality had no token.
    """

    experts: tuple[str, ...]
    top_k: int
    fractions: Mapping[str, Mapping[int, np.ndarray]]

    @classmethod
    def from_records(cls, records: Records) -> ExpertUse:
        """Add up counts.

        Args:
            records: Of one model, at least one (``read_routing``).

        Raises:
            UserError: No record, or records of different experts or layers.
        """
        if not records:
            raise UserError("There are no routing records to add up.")
        first = records[0]
        for record in records:
            if (record["experts"], [*record["layers"]]) != (first["experts"], [*first["layers"]]):
                raise UserError(
                    "The routing records come from models with different experts or layers: "
                    "draw the records of one run."
                )
        fractions: dict[str, dict[int, np.ndarray]] = {modality: {} for modality in MODALITIES}
        for modality in MODALITIES:
            for number in sorted(first["layers"], key=int):
                parts = [record["layers"][number][modality] for record in records]
                tokens = sum(part["tokens"] for part in parts)
                load = np.sum([part["load"] for part in parts], axis=0)
                fractions[modality][int(number)] = load / max(tokens, 1)
        return cls(tuple(first["experts"]), first["top_k"], fractions)

    @property
    def layers(self) -> list[int]:
        """Layers with experts, from 0."""
        return list(self.fractions[MODALITIES[0]])

    def group(self, expert: int) -> str:
        """``vision``, ``shared`` or ``text``."""
        return self.experts[expert].split(".")[0]

    def is_allowed(self, expert: int, modality: str) -> bool:
        """Whether tokens of the modality may use the expert."""
        return self.group(expert) in (modality, "shared")

    def present(self) -> list[str]:
        """Modalities that had tokens."""
        return [m for m in MODALITIES if any(part.any() for part in self.fractions[m].values())]


def short_name(name: str) -> str:
    """``shared.1`` -> ``S1``."""
    group, number = name.split(".")
    return group[0].upper() + number


def groups_of(experts: Sequence[str]) -> list[str]:
    """Groups in the order of the experts."""
    return list(dict.fromkeys(name.split(".")[0] for name in experts))
