"""Named classes, tensors and arrays are unpickled; nothing else is, and no class is changed."""

from __future__ import annotations

import io
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moiie_megatron.utils.restricted_pickle import unpickle
from tests.helpers.user_errors import user_error


@dataclass
class State:
    """What a stream might save."""

    rng: Any
    parts: list[Any]


NAMES = frozenset({(State.__module__, "State")})


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


class HiddenPayload(Payload):
    """The same inside a pickle that torch.storage would load without restrictions."""

    def __reduce__(self) -> Any:
        content = io.BytesIO()
        torch.save(Payload(self.marker), content)
        return torch.storage._load_from_bytes, (content.getvalue(),)


def test_states_come_back() -> None:
    state = State(torch.get_rng_state(), [State(np.arange(5), [1, "a"]), {"b": b"c"}, (0.5, None)])
    found = unpickle(pickle.dumps(state), NAMES, "the state")
    assert isinstance(found, State) and torch.equal(found.rng, state.rng)
    assert np.array_equal(found.parts[0].rng, np.arange(5)) and found.parts[1:] == state.parts[1:]


@pytest.mark.parametrize("kind", [Payload, HiddenPayload])
def test_nothing_is_run(kind: type[Payload], tmp_path: Path) -> None:
    data = pickle.dumps(State(None, [kind(tmp_path / "ran")]))
    with user_error("the state", "cannot be read"):
        unpickle(data, NAMES, "the state")
    assert not (tmp_path / "ran").exists()


def test_classes_are_not_changed() -> None:
    opcodes = f"c{State.__module__}\nState\n(dVevil\nI1\nsb.".encode()
    with user_error("the state", "it changes"):
        unpickle(opcodes, NAMES, "the state")
    assert not hasattr(State, "evil")


@pytest.mark.parametrize("data", [b"", b"\x80", pickle.dumps(State(None, []))[:-5]])
def test_damaged_bytes(data: bytes) -> None:
    with user_error("the state", "cannot be read"):
        unpickle(data, NAMES, "the state")
