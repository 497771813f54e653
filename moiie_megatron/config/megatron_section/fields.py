"""Look up a field of Megatron-Core's TransformerConfig in the tables."""

from __future__ import annotations

from fnmatch import fnmatchcase

from moiie_megatron.config.megatron_section.allowed import ALLOWED, Allowed
from moiie_megatron.config.megatron_section.owned import OWNED
from moiie_megatron.config.megatron_section.refused import REFUSED, Refused


def classify(name: str) -> Allowed | str | Refused | None:
    """What is known about a field.

    Returns:
        ``Allowed``, the key that sets it, ``Refused``, or None if it is in no table.
    """
    if name in ALLOWED:
        return ALLOWED[name]
    if name in OWNED:
        return OWNED[name]
    matches = [
        refused for refused in REFUSED if any(fnmatchcase(name, known) for known in refused.names)
    ]
    return matches[0] if matches else None
