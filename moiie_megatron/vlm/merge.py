"""Where image features meet token embeddings.

The data side has expanded every placeholder to one id per image token, so the length of a
sequence never changes here.

Shapes: b batch, s sequence, h hidden, n images, p image tokens per image.
"""

from __future__ import annotations

from torch import Tensor

from moiie_megatron.layout.token_types import IMAGE


def merge_images(embeddings_sbh: Tensor, features_nph: Tensor, token_types_bs: Tensor) -> Tensor:
    """Put image features at the image positions, in row-major order of the batch.

    Returns:
        ``(s, b, h)`` in the dtype of the embeddings.

    Raises:
        ValueError: The numbers of image positions and of image features differ.
    """
    n, p, _ = features_nph.shape
    is_image_bs = token_types_bs == IMAGE
    # One host sync per micro-batch, on the first pipeline stage alone.
    positions = int(is_image_bs.sum())
    if positions != n * p:
        raise ValueError(
            f"The tokens hold {positions} image positions, but there are {n} images of {p} image "
            f"tokens each ({n * p}): every placeholder must be expanded to {p} image ids."
        )
    embeddings_bsh = embeddings_sbh.transpose(0, 1)
    merged_bsh = embeddings_bsh.masked_scatter(
        is_image_bs.unsqueeze(-1), features_nph.to(embeddings_sbh.dtype)
    )
    return merged_bsh.transpose(0, 1).contiguous()
