from __future__ import annotations

import torch

from moiie_megatron.data.stream.stream_state import StreamState


def test_what_was_saved_comes_back() -> None:
    state = StreamState()
    assert state.tensor().dtype == torch.uint8 and len(state.tensor()) == 0
    state.source = lambda: b"\x00abc\xff"
    tensor = state.tensor()
    assert tensor.tolist() == [0, 97, 98, 99, 255]
    again = StreamState()
    again.restore(tensor)
    assert again.restored == b"\x00abc\xff"
    assert torch.equal(again.tensor(), tensor)  # saved again before the stream has started
