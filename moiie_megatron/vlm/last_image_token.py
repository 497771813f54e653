"""The routing rule of the reference's code, kept for models that were trained with it.

In the published code (github.com/AlenjandroWang/MoIIE, commit c614868) the type of the *next*
token counts as well: the last image token of every run is routed like text, and so is an image
token at the end of a row.  The paper routes by the token's own type.

Shape letters: see ``moe/__init__.py``.
"""

from __future__ import annotations

from torch import Tensor

from moiie_megatron.layout.token_types import IMAGE, TEXT


def last_image_tokens_as_text(token_types: Tensor) -> Tensor:
    """Turn the last image token of every run into a text token.

    For routing only: images are merged at the true types.

    Args:
        token_types: int8 ``(b, s)``, whole rows: not yet split for sequence parallelism.

    Returns:
        int8 ``(b, s)``.
    """
    is_image = token_types == IMAGE
    is_last = is_image.clone()
    is_last[:, :-1] &= ~is_image[:, 1:]
    return token_types.masked_fill(is_last, TEXT)
