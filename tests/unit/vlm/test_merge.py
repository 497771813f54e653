"""Image features in the place of image tokens, by hand.

row 0   text   image  image          row 1   image  image  text
        a      .      .                      .      .      b

two images of two features: 1 2 and 3 4
"""

from __future__ import annotations

import pytest
import torch

from moiie_megatron.layout.token_types import IMAGE, TEXT
from moiie_megatron.vlm.merge import merge_images

TYPES = torch.tensor([[TEXT, IMAGE, IMAGE], [IMAGE, IMAGE, TEXT]], dtype=torch.int8)
FEATURES = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).unsqueeze(-1).repeat(1, 1, 5)  # (i, p, h)


def test_features_fill_image_positions_in_order() -> None:
    embeddings = torch.full((3, 2, 5), 9.0)  # (s, b, h)
    merged = merge_images(embeddings, FEATURES, TYPES)
    assert merged.shape == (3, 2, 5) and merged.is_contiguous()
    assert merged[:, 0, 0].tolist() == [9, 1, 2]
    assert merged[:, 1, 4].tolist() == [3, 4, 9]


def test_gradients_go_where_the_values_came_from() -> None:
    embeddings = torch.zeros(3, 2, 5, requires_grad=True)
    features = FEATURES.clone().requires_grad_()
    merge_images(embeddings, features, TYPES).sum().backward()
    assert features.grad is not None and features.grad.eq(1).all()
    assert embeddings.grad is not None
    assert embeddings.grad[:, :, 0].tolist() == [[1, 0], [0, 0], [0, 1]]


def test_the_embeddings_decide_the_dtype() -> None:
    merged = merge_images(torch.zeros(3, 2, 5, dtype=torch.bfloat16), FEATURES, TYPES)
    assert merged.dtype == torch.bfloat16


def test_another_number_of_images_is_refused() -> None:
    with pytest.raises(ValueError, match="4 image positions.* 1 images of 2"):
        merge_images(torch.zeros(3, 2, 5), FEATURES[:1], TYPES)
