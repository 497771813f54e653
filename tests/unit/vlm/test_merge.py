"""Image features in the place of image tokens, by hand.

row 0   text   image  image          row 1   image  image  text
        a      .      .                      .      .      b

two images of two features: 1 2 and 3 4
"""

from __future__ import annotations

import torch

from moiie_megatron.data.stream.batch import image_positions
from moiie_megatron.layout.token_types import IMAGE, TEXT
from moiie_megatron.vlm.merge import merge_images

TYPES = torch.tensor([[TEXT, IMAGE, IMAGE], [IMAGE, IMAGE, TEXT]], dtype=torch.int8)
POSITIONS = image_positions(TYPES)
FEATURES = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).unsqueeze(-1).repeat(1, 1, 5)  # (i, p, h)


def test_positions_are_in_the_order_of_the_images() -> None:
    assert POSITIONS.tolist() == [2, 4, 1, 3]  # in (s, b)
    assert image_positions(torch.zeros_like(TYPES)).shape == (0,)


def test_features_fill_image_positions_in_order() -> None:
    embeddings = torch.full((3, 2, 5), 9.0)  # (s, b, h)
    merged = merge_images(embeddings, FEATURES, POSITIONS)
    assert merged.shape == (3, 2, 5) and merged.is_contiguous()
    assert merged[:, 0, 0].tolist() == [9, 1, 2]
    assert merged[:, 1, 4].tolist() == [3, 4, 9]


def test_gradients_go_where_the_values_came_from() -> None:
    embeddings = torch.zeros(3, 2, 5, requires_grad=True)
    features = FEATURES.clone().requires_grad_()
    merge_images(embeddings, features, POSITIONS).sum().backward()
    assert features.grad is not None and features.grad.eq(1).all()
    assert embeddings.grad is not None
    assert embeddings.grad[:, :, 0].tolist() == [[1, 0], [0, 0], [0, 1]]


def test_the_embeddings_decide_the_dtype() -> None:
    merged = merge_images(torch.zeros(3, 2, 5, dtype=torch.bfloat16), FEATURES, POSITIONS)
    assert merged.dtype == torch.bfloat16
