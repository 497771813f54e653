"""The vision encoder: what it runs, and recomputation."""

from __future__ import annotations

import pytest
import torch

from moiie_megatron.vlm.vision import VisionEncoder
from tests.parity import tiny


def _encoder(family: str, *, recompute: bool) -> VisionEncoder:
    torch.manual_seed(0)
    return VisionEncoder(tiny.vision(family, num_layers=3, recompute=recompute))


@pytest.mark.parametrize("family", ["siglip", "clip"])
def test_recomputation_changes_nothing(family: str) -> None:
    plain, again = (_encoder(family, recompute=recompute) for recompute in (False, True))
    runs = []
    for layer in (*plain.model.encoder.layers, *again.model.encoder.layers):
        layer.register_forward_pre_hook(lambda *_: runs.append(1))
    size = plain.config.image_size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    features = plain(images)
    assert features.shape == (2, plain.config.num_image_tokens, plain.config.hidden_size)
    features.square().sum().backward()
    assert len(runs) == 2  # the layer behind the features is not run
    runs.clear()
    other = again(images)
    other.square().sum().backward()
    assert len(runs) == 4
    assert torch.equal(features, other)
    for one, two in zip(plain.parameters(), again.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None) == (not one.requires_grad)
        assert one.grad is None or torch.equal(one.grad, two.grad)


@pytest.mark.parametrize("family", ["siglip", "clip"])
def test_without_images_every_weight_still_gets_a_gradient(family: str) -> None:
    """Of zeros, and every module that runs for an image has run."""
    encoder = _encoder(family, recompute=True)
    runs = []
    for module in encoder.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(lambda module, _: runs.append(module))
    side = encoder.config.image_size
    encoder(torch.zeros(1, 3, side, side))
    with_images, runs[:] = list(runs), []
    features = encoder(torch.empty(0, 3, side, side))
    assert features.shape == (0, encoder.config.num_image_tokens, encoder.config.hidden_size)
    assert runs == with_images and len(runs) > 16
    features.sum().backward()
    gradients = [p.grad for p in encoder.parameters() if p.requires_grad]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
