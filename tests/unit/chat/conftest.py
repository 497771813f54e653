from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moiie_megatron.chat.conversation import Chat
from moiie_megatron.chat.limits import Limits
from moiie_megatron.exported.model import ExportedModel
from tests.helpers.tiny_export import write_export


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    """Four experts in layers 1 and 3; not to be changed."""
    export = write_export(tmp_path_factory.mktemp("chat") / "tiny")
    limits = Limits(megabytes=1, megapixels=1, pictures=2, characters=60, new_tokens=20)
    return Chat(ExportedModel.load(export, device="cpu"), limits)


@pytest.fixture(scope="session")
def export(chat: Chat) -> Path:
    return Path(chat.model.model.config._name_or_path)
