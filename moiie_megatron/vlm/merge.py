"""Put image features in the place of the image tokens' embeddings.

The data pipeline has expanded every image placeholder to one id per image token, so the length
of a sequence never changes here.

Shape letters: see ``moe/__init__.py``.
"""

from __future__ import annotations

from torch import Tensor


def merge_images(embeddings_sbh: Tensor, features_iph: Tensor, image_positions: Tensor) -> Tensor:
    """Put image features at the image positions; neither pass waits for the device.

    Args:
        embeddings_sbh: Token embeddings.
        features_iph: Image features in the language model's embedding space.
        image_positions: int64 ``(i * p,)``, where they go in the flattened ``(s, b)``.

    Returns:
        ``(s, b, h)`` in the dtype of the embeddings.
    """
    merged = embeddings_sbh.flatten(0, 1).index_copy(
        0, image_positions, features_iph.flatten(0, 1).to(embeddings_sbh.dtype)
    )
    return merged.view_as(embeddings_sbh)
