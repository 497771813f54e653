"""This directory is collected where ``MOIIE_TEST_TE`` names a Transformer Engine, and only there.

``make test`` runs it once for each version, in a pytest process of its own: Megatron-Core looks
for Transformer Engine once, when it is imported.  If it cannot be imported, nothing passes.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

import pytest

from tests.te.standin.install import VARIABLE, install

if TYPE_CHECKING:
    from moiie_megatron.mcore.parallel import ParallelContext

if VARIABLE in os.environ:
    install(os.environ[VARIABLE])
    import megatron.core.extensions.transformer_engine  # noqa: F401
else:
    collect_ignore_glob = ["*"]


@pytest.fixture(scope="module")
def te(context: ParallelContext) -> ParallelContext:
    """One process on the CPU whose models are built of Transformer Engine's modules."""
    assert context.device.transformer_engine
    return context


@pytest.fixture(scope="module")
def local(context: ParallelContext) -> ParallelContext:
    """The same process, with the project's own modules."""
    device = dataclasses.replace(context.device, transformer_engine=False)
    return dataclasses.replace(context, device=device)
