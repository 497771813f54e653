"""What the self-test needs to run over the stand-in (``tests/helpers/hooked.py``)."""

from __future__ import annotations

from tests.te.standin.install import VARIABLE


def references_without(rank: int) -> None:
    """The process that computes the references hides Transformer Engine, as on a GPU node."""
    from moiie_megatron.selftest import reference

    reference._LAUNCHER += (VARIABLE,)  # type: ignore[misc, assignment]
