from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moiie_megatron.exported.model import ExportedModel
from tests.helpers.tiny_export import write_export


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four experts (1 vision, 2 shared, 1 text) in layers 1 and 3; its checkpoint is beside it."""
    return write_export(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def model(export: Path) -> ExportedModel:
    """Not to be changed."""
    return ExportedModel.load(export, device="cpu")
