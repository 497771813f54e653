"""A MoIIE layer refuses to guess what its tokens are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moiie_megatron.config.load import load_config
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.moe.layer import MoIIELayer
from moiie_megatron.vlm.build import build_model
from tests.helpers.tiny_run import tiny_values, write_config


def test_missing_or_misshapen_token_types(tmp_path: Path, context: ParallelContext) -> None:
    config = load_config(write_config(tmp_path / "run.yaml", tiny_values(tmp_path, tmp_path)))
    model = build_model(config, context)
    layers = [m for m in model.modules() if isinstance(m, MoIIELayer)]
    assert [layer.layer_number for layer in layers] == [2, 4]
    hidden = torch.zeros(6, 2, 64)
    with pytest.raises(ValueError, match="layer 2 .*none.* 6 .* 2"):
        layers[0](hidden)
    with pytest.raises(ValueError, match=r"\(2, 5\)"):
        layers[0](hidden, padding_mask=torch.zeros(2, 5, dtype=torch.int8))
    output, _ = layers[0](hidden, padding_mask=torch.zeros(2, 6, dtype=torch.int8))
    assert output.shape == hidden.shape
