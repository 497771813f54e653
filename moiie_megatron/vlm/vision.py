"""The vision encoder: a tower of transformers, up to the feature layer.

Shape letters: see ``moe/__init__.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel

from moiie_megatron.config.schema import VisionConfig
from moiie_megatron.families.hf_config import vision_to_hf
from moiie_megatron.families.registry import vision_family


class VisionEncoder(torch.nn.Module):
    """Images to one feature per patch: ``hidden_states[feature_layer]`` without a class token.

    Its weights are on every tensor-parallel rank, its images are split over them
    (``image_split.py``).
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.family = vision_family(config.family)
        self.model: Any = build_vision_model(config)  # its submodules depend on the family
        for module in self._unused():
            module.requires_grad_(False)

    @property
    def _num_layers(self) -> int:
        """Number of layers that the features depend on; later layers are never run."""
        return self.config.num_feature_layers

    def _unused(self) -> list[torch.nn.Module]:
        """Modules after the feature layer: kept for export, never trained."""
        return [*self.model.encoder.layers[self._num_layers :], self.model.post_layernorm]

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that the features depend on."""
        unused = {id(p) for module in self._unused() for p in module.parameters()}
        return [p for p in self.parameters() if id(p) not in unused]

    def forward(self, images: Tensor) -> Tensor:
        """Encode normalised images.

        Args:
            images: ``(i, 3, image_size, image_size)``, float; i may be 0.

        Returns:
            ``(i, p, hidden_size)``, with p of ``VisionConfig.num_image_tokens``.  Without images
            it still depends on every trained weight, and all modules have run: gradient
            reductions and parameter gathers that overlap with the passes wait for each of them.
        """
        if len(images):
            return self._encode(images)
        # transformers' modules refuse an empty batch: one patch of a blank image runs instead.
        side, p = self.config.image_size, self.config.num_image_tokens
        blank = images.new_zeros(1, 3, side, side)
        return self._encode(blank, patches=1)[:0].expand(-1, p, -1)

    def _encode(self, images: Tensor, patches: int | None = None) -> Tensor:
        """The features of all patches, or of the first ones as if there were no others."""
        dtype = next(self.model.parameters()).dtype
        hidden = self.model.embeddings(images.to(dtype))
        if patches is not None:
            hidden = hidden[:, : self.family.num_class_tokens + patches]
        if self.family.pre_norm is not None:
            hidden = self.model.get_submodule(self.family.pre_norm)(hidden)
        for layer in self.model.encoder.layers[: self._num_layers]:
            if self.config.recompute and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, None, use_reentrant=False)
            else:
                hidden = layer(hidden, None)
        return hidden[:, self.family.num_class_tokens :]


def build_vision_model(config: VisionConfig) -> torch.nn.Module:
    """A transformers vision model with fresh weights.

    Without the pooling head: the language model sees patch features only.
    """
    model: torch.nn.Module = AutoModel.from_config(vision_to_hf(config))
    return model
