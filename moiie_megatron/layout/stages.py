"""How many decoder layers each pipeline stage has."""

from __future__ import annotations


def layers_of_stages(
    num_layers: int, stages: int, first: int | None = None, last: int | None = None
) -> list[int] | None:
    """Layers of every pipeline stage, in order; None if they cannot be divided so.

    Args:
        num_layers: Layers of the whole decoder.
        stages: Number of pipeline stages.
        first: Layers of the first stage; None for as many as the stages in the middle.
        last: Layers of the last stage, as ``first``.
    """
    ends = [count for count in (first, last) if count is not None]
    middle, rest = stages - len(ends), num_layers - sum(ends)
    if middle < 0 or min(ends, default=1) < 1:
        return None
    if middle == 0:
        return ends if rest == 0 else None
    if rest < middle or rest % middle:
        return None
    sizes = [rest // middle] * middle
    return [*([first] if first is not None else []), *sizes, *([last] if last is not None else [])]
