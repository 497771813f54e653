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

    Replicated over tensor-parallel ranks: 1 to 3 % of the arithmetic of a step.
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
            images: ``(i, 3, image_size, image_size)``, float.

        Returns:
            ``(i, p, hidden_size)``, with p of ``VisionConfig.num_image_tokens``.
        """
        dtype = next(self.model.parameters()).dtype
        hidden = self.model.embeddings(images.to(dtype))
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
