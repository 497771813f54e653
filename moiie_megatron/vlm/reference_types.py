"""The reference's own rule for token types, kept for models that were trained with it.

Its published code (github.com/AlenjandroWang/MoIIE, commit c614868) looks at the type of the next
token as well: the last image token of every run goes to the text experts, and so does an image
token at the end of a row.  The paper's rule is the type alone.
"""

from __future__ import annotations

from torch import Tensor

from moiie_megatron.layout.token_types import IMAGE, TEXT


def reference_types(token_types: Tensor) -> Tensor:
    """Token types as the reference routes them; where images are merged, the true types count.

    Args:
        token_types: int8 ``(b, s)``, whole rows: not yet cut for sequence parallelism.

    Returns:
        int8 ``(b, s)``.
    """
    is_image = token_types == IMAGE
    is_last = is_image.clone()
    is_last[:, :-1] &= ~is_image[:, 1:]
    return token_types.masked_fill(is_last, TEXT)
