"""The one definition of what a token is: its type decides which experts may process it.

Token types travel with the tokens as an int8 tensor of the same shape.  Padding routes like
text (its hidden states must go somewhere) but is left out of the losses and of the routers'
load-balancing losses.  Plain ints, so that configuration and planning need no torch.
"""

from __future__ import annotations

from typing import Final, Literal

TEXT: Final = 0
IMAGE: Final = 1
PADDING: Final = 2

# Names of what experts are chosen for, image tokens and text tokens, in the order of everything
# that has one entry for each.
MODALITIES: Final[tuple[Literal["vision", "text"], ...]] = ("vision", "text")
