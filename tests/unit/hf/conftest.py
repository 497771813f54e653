from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moiie_megatron.hf.processing_moiie import MoiieProcessor
from tests.unit.hf import tiny


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def processor(tmp_path_factory: pytest.TempPathFactory) -> MoiieProcessor:
    return tiny.processor(tmp_path_factory.mktemp("processor"))


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh folder below which tests may write."""
    return tmp_path_factory.mktemp("hf")
