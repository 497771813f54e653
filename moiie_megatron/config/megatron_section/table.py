"""What is known about the fields of one of Megatron-Core's configuration classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

Losses = Literal["the same", "the same up to rounding", "different"]


@dataclass(frozen=True)
class Allowed:
    """A field that may be set.

    Attributes:
        kind: Type of its values, for pydantic; null leaves the field alone.
        effect: What it does.
        losses: Losses and gradients, compared with those without it.
        needs: When it may be set; empty for always.  ``check_model.py``, ``check_training.py``
            and ``mcore/device_checks.py`` have the conditions.
    """

    kind: Any
    effect: str
    losses: Losses
    needs: str = ""


@dataclass(frozen=True)
class Refused:
    """Fields that are refused for one reason.

    Attributes:
        reason: Completes "FIELD is VALUE, but".
        names: The fields; a name with ``*`` stands for all that match.
        instead: What the user can do; ``leave it out`` where there is nothing else.
        inert: Setting them changes nothing in this project, which a test shows.
    """

    reason: str
    names: tuple[str, ...]
    instead: str = "leave it out"
    inert: bool = False


@dataclass(frozen=True)
class MegatronSection:
    """A section of the configuration that sets fields of one class.

    Attributes:
        key: Its dotted key.
        class_name: Name of the class in Megatron-Core.
        allowed: The fields that may be set.
        owned: The fields that another key of the configuration sets, and that key.
        refused: All other fields of Megatron-Core 0.16 to 0.19.
    """

    key: str
    class_name: str
    allowed: Mapping[str, Allowed]
    owned: Mapping[str, str]
    refused: tuple[Refused, ...]

    def classify(self, name: str) -> Allowed | str | Refused | None:
        """What is known about a field.

        Returns:
            ``Allowed``, the key that sets it, ``Refused``, or None if it is in no table.
        """
        if name in self.allowed:
            return self.allowed[name]
        if name in self.owned:
            return self.owned[name]
        matches = [
            refused
            for refused in self.refused
            if any(fnmatchcase(name, known) for known in refused.names)
        ]
        return matches[0] if matches else None
