"""Put image features in the place of the image tokens' embeddings.

The data pipeline has expanded every image placeholder to one id per image token, so the length
of a sequence never changes here.

Shape letters: see ``moe/__init__.py``.
"""

from __future__ import annotations

from torch import Tensor

from moiie_megatron.layout.token_types import IMAGE


def merge_images(embeddings_sbh: Tensor, features_iph: Tensor, token_types_bs: Tensor) -> Tensor:
    """Put image features at the image positions, in row-major order of the batch.

    Args:
        embeddings_sbh: Token embeddings.
        features_iph: Image features in the language model's embedding space.
        token_types_bs: int8, see ``layout/token_types.py``.

    Returns:
        ``(s, b, h)`` in the dtype of the embeddings.

    Raises:
        ValueError: The numbers of image positions and of image features differ.
    """
    i, p, _ = features_iph.shape
    is_image_bs = token_types_bs == IMAGE
    # Device-to-host sync, once per micro-batch, on the first pipeline stage only.
    positions = int(is_image_bs.sum())
    if positions != i * p:
        raise ValueError(
            f"The tokens hold {positions} image positions, but there are {i} images of {p} image "
            f"tokens each ({i * p}): every placeholder must be expanded to {p} image ids."
        )
    embeddings_bsh = embeddings_sbh.transpose(0, 1)
    merged_bsh = embeddings_bsh.masked_scatter(
        is_image_bs.unsqueeze(-1), features_iph.to(embeddings_sbh.dtype)
    )
    return merged_bsh.transpose(0, 1).contiguous()
