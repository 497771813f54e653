"""Transformer Engine's layers fuse weight gradients where Apex is missing, too."""

from __future__ import annotations

import pytest
from megatron.core.tensor_parallel import layers

from moiie_megatron.mcore import config as mcore_config
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.vlm import language_model
from moiie_megatron.vlm.build import build_model
from tests.helpers.megatron_cases import largest_difference, take_step, tiny_config


def test_the_output_layer_goes_without(
    te: ParallelContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = take_step(tiny_config(experts=True), te)
    monkeypatch.setattr(mcore_config, "_fuses_weight_gradients", lambda device: True)
    monkeypatch.setattr(language_model, "HAS_APEX_EXTENSION", False)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    config = tiny_config(experts=True)
    model = build_model(config, te).language_model
    assert not model.output_layer.gradient_accumulation_fusion
    fused = [
        module.fuse_wgrad_accumulation
        for module in model.decoder.modules()
        if hasattr(module, "fuse_wgrad_accumulation")
    ]
    assert len(fused) > 4 and all(fused)
    assert largest_difference(take_step(config, te), plain) < 1e-5
    assert not layers._grad_accum_fusion_available
