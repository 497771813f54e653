"""The alignment that torch's grouped matrix multiplication needs."""

from __future__ import annotations

from typing import Final

# ``torch.nn.functional.grouped_mm`` refuses matrices whose rows are not a multiple of so many
# bytes apart.
GROUPED_MM_BYTES: Final = 16
