"""The state of a stream as a tensor, there and back."""

from __future__ import annotations

import torch

from moiie_megatron.data.stream.stream_state import StreamState


class Stream:
    def __init__(self) -> None:
        self.position = 0

    def state_bytes(self) -> bytes:
        return b"\x00abc\xff" + bytes([self.position])


def test_what_was_saved_comes_back() -> None:
    state, stream = StreamState(), Stream()
    assert state.tensor().dtype == torch.uint8 and len(state.tensor()) == 0
    state.attach(stream)
    stream.position = 3  # the state as it is when it is saved
    tensor = state.tensor()
    assert tensor.tolist() == [0, 97, 98, 99, 255, 3]
    again = StreamState()
    again.restore(tensor)
    assert again.restored == b"\x00abc\xff\x03"
    assert torch.equal(again.tensor(), tensor)  # saved again before the stream has started
