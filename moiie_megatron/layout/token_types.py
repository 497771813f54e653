"""Token types, which decide the experts that may process a token.

A batch carries them as an int8 tensor of the shape of its token ids.  Padding is routed like
text (its hidden states must go somewhere) but excluded from the language-model loss and from the
load-balancing losses.  Plain ints, so that configuration and planning need no torch.
"""

from __future__ import annotations

from typing import Final, Literal

TEXT: Final = 0
IMAGE: Final = 1
PADDING: Final = 2

# Token modalities, in the order used by every per-modality axis M.
MODALITIES: Final[tuple[Literal["vision", "text"], ...]] = ("vision", "text")
