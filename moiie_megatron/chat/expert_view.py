"""The experts of every token as HTML: coloured tokens, and a grid over each picture.

Shapes: S tokens, E experts, K experts per token, P image tokens of a picture.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterator
from typing import Final

import torch
from matplotlib.colors import to_hex
from PIL import Image
from torch import Tensor

from moiie_megatron.analysis.figure import expert_colour
from moiie_megatron.chat.conversation import Tokens
from moiie_megatron.chat.pictures import Picture
from moiie_megatron.routing_stats.expert_use import short_name

_GRID_ALPHA: Final = 150  # of 255: the picture shines through
_TINT: Final = "38"  # the alpha of a token's background, in hexadecimal
_KEY: Final = (
    '<div class="key">The bar below a token shows the weights of its experts, the colour behind it '
    "the first of them; over a picture, each square mixes the colours of one token.</div>"
)
_WIDTH: Final = 220  # pixels of a picture's shorter side at most
STYLE: Final = """
<style>
.experts { font-size: 14px; line-height: 1.35; }
.experts h4 { margin: 14px 0 6px; font-size: 14px; }
.experts .key { font-size: 12px; opacity: 0.75; }
.experts .legend { display: flex; flex-wrap: wrap; gap: 4px 14px; margin: 4px 0 8px; }
.experts .legend i { display: inline-block; width: 12px; height: 12px; border-radius: 2px;
  margin-right: 5px; vertical-align: -1px; }
.experts .tokens { display: flex; flex-wrap: wrap; gap: 5px 2px; }
.experts .token { display: inline-flex; flex-direction: column; align-items: center;
  min-width: 14px; max-width: 100%; }
.experts .token b { font-weight: 400; font-family: ui-monospace, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; padding: 1px 2px; border-radius: 3px 3px 0 0; }
.experts .token i { height: 4px; width: 100%; }
.experts .token small { font-size: 9px; line-height: 1.3; opacity: 0.75; white-space: nowrap; }
.experts .pictures { display: flex; flex-wrap: wrap; gap: 12px; }
.experts figure { margin: 0; }
.experts .grid { position: relative; overflow: hidden; border-radius: 4px; max-width: 100%; }
.experts .grid img { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0;
  object-fit: fill; }
.experts .grid img + img { image-rendering: pixelated; }
.experts figcaption { font-size: 12px; opacity: 0.85; margin-top: 3px; }
</style>
"""


def expert_view(tokens: Tokens, number: int) -> str:
    """The page's view of one MoE layer.

    Args:
        tokens: Of a conversation.
        number: Of the MoE layer among all of them, from 0.
    """
    routing = tokens.routing
    shown = _View(tokens, number)
    head = f"Decoder layer {routing.layers[number]}, MoE layer {number + 1} of "
    pictures = "".join(shown.pictures())
    return (
        f'{STYLE}<div class="experts"><div>{head}{len(routing.layers)}</div>{shown.legend()}{_KEY}'
        + (f'<h4>Image tokens</h4><div class="pictures">{pictures}</div>' if pictures else "")
        + f'<h4>Prompt</h4><div class="tokens">{"".join(shown.chips(0, routing.prompt))}</div>'
        + f'<h4>Answer</h4><div class="tokens">{"".join(shown.chips(routing.prompt))}</div></div>'
    )


class _View:
    def __init__(self, tokens: Tokens, number: int) -> None:
        self._tokens = tokens
        self._names = tokens.routing.names
        self._experts_SK = tokens.routing.experts_LSK[number]
        self._weights_SK = tokens.routing.weights_LSK[number]
        self._colours = [to_hex(expert_colour(name, self._names)) for name in self._names]
        is_image_S = tokens.routing.tokens_S == tokens.image_id
        is_image_S[tokens.routing.prompt :] = False  # what is generated is text
        self._is_image_S = is_image_S

    def legend(self) -> str:
        items = (
            f'<span><i style="background:{colour}"></i>{short_name(name)} {name}</span>'
            for name, colour in zip(self._names, self._colours, strict=True)
        )
        return f'<div class="legend">{"".join(items)}</div>'

    def chips(self, start: int, stop: int | None = None) -> Iterator[str]:
        """Text tokens; one chip stands for the tokens of a picture."""
        picture = 0
        texts, is_image = self._tokens.texts, self._is_image_S.tolist()
        position, stop = start, len(texts) if stop is None else stop
        while position < stop:
            if is_image[position]:
                picture += 1
                yield f'<span class="token"><b>[picture {picture}]</b></span>'
                position += self._tokens.per_picture
            else:
                yield self._chip(position, texts[position])
                position += 1

    def _chip(self, position: int, text: str) -> str:
        experts = self._experts_SK[position].tolist()
        weights = self._weights_SK[position].tolist()
        stops, edge = [], 0.0
        for expert, weight in zip(experts, weights, strict=True):
            stops.append(f"{self._colours[expert]} {edge:.0%} {edge + weight:.0%}")
            edge += weight
        title = ", ".join(
            f"{self._names[expert]} {weight:.2f}"
            for expert, weight in zip(experts, weights, strict=True)
        )
        names = " ".join(short_name(self._names[expert]) for expert in experts)
        return (
            f'<span class="token" title="{title}">'
            f'<b style="background:{self._colours[experts[0]]}{_TINT}">{_visible(text)}</b>'
            f'<i style="background:linear-gradient(90deg,{",".join(stops)})"></i>'
            f"<small>{names}</small></span>"
        )

    def pictures(self) -> Iterator[str]:
        """Each picture below the grid of its image tokens."""
        positions = torch.nonzero(self._is_image_S).flatten()
        runs = positions.view(-1, self._tokens.per_picture)
        for number, (run, picture) in enumerate(zip(runs, self._tokens.pictures, strict=True), 1):
            yield self._picture(number, run, picture)

    def _picture(self, number: int, positions: Tensor, picture: Picture) -> str:
        experts_PK, weights_PK = self._experts_SK[positions], self._weights_SK[positions]
        weights_E = torch.zeros(len(self._names)).index_add_(
            0, experts_PK.flatten(), weights_PK.flatten().float()
        )
        parts = (
            f"{short_name(name)} {fraction:.0%}"
            for name, fraction in zip(
                self._names, (weights_E / len(positions)).tolist(), strict=True
            )
            if fraction > 0
        )
        width, height = _WIDTH * max(picture.aspect, 1.0), _WIDTH / min(picture.aspect, 1.0)
        scale = min(1.0, 1.5 * _WIDTH / max(width, height))
        size = f"width:{width * scale:.0f}px;aspect-ratio:{picture.aspect:.4f}"
        return (
            f'<figure><div class="grid" style="{size}"><img alt="picture {number}" '
            f'src="{_data(picture.square)}"><img alt="experts of its tokens" '
            f'src="{_data(self._grid(experts_PK, weights_PK))}"></div>'
            f"<figcaption>Picture {number}: {', '.join(parts)} of the weight</figcaption></figure>"
        )

    def _grid(self, experts_PK: Tensor, weights_PK: Tensor) -> Image.Image:
        """One pixel for each image token: its experts' colours, mixed by their weights."""
        colours = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in self._colours]
        mixed_P3 = (torch.tensor(colours)[experts_PK] * weights_PK.unsqueeze(-1)).sum(dim=1)
        rgb = mixed_P3.round().clamp(0, 255).byte()
        alpha = torch.full((len(rgb), 1), _GRID_ALPHA, dtype=torch.uint8)
        side = math.isqrt(len(rgb))
        shape = (side, side) if side * side == len(rgb) else (1, len(rgb))
        return Image.fromarray(torch.cat([rgb, alpha], dim=1).view(*shape, 4).numpy())


def _visible(text: str) -> str:
    """Escaped, with white space that can be seen."""
    if not text.strip():
        text = text.replace("\n", "\\n").replace("\t", "\\t") or " "
    return html.escape(text)


def _data(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
