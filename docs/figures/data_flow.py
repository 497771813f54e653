"""Draw ``data_flow.svg``, the picture of the README: ``python docs/figures/data_flow.py``.

Plain SVG, one function per kind of shape: no font, library or clock can change the result.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 1000, 664
OURS, OURS_LINE = "#dbeafe", "#2563eb"
MEGATRON, MEGATRON_LINE = "#f0f4e8", "#76923c"
TYPES = "#d9480f"
INK, GREY = "#1f2937", "#6b7280"
SANS = "Helvetica, Arial, 'DejaVu Sans', sans-serif"
MONO = "Menlo, Consolas, 'DejaVu Sans Mono', monospace"


class Drawing:
    """Collects SVG elements; coordinates are pixels from the top left corner."""

    def __init__(self) -> None:
        self.elements: list[str] = []

    def box(self, x: int, y: int, w: int, h: int, fill: str = OURS, line: str = OURS_LINE) -> None:
        """A rounded rectangle."""
        self.elements.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="6" fill="{fill}" '
            f'stroke="{line}" stroke-width="1.3"/>'
        )

    def text(
        self,
        x: int,
        y: int,
        words: str,
        *,
        size: int = 13,
        color: str = INK,
        font: str = SANS,
        anchor: str = "middle",
        bold: bool = False,
    ) -> None:
        """One line of text; y is its base line."""
        weight = ' font-weight="bold"' if bold else ""
        self.elements.append(
            f'<text x="{x}" y="{y}" font-family="{font}" font-size="{size}" fill="{color}" '
            f'text-anchor="{anchor}"{weight}>{escape(words)}</text>'
        )

    def label(self, x: int, y: int, title: str, *notes: str, anchor: str = "middle") -> None:
        """A title in bold with small lines in a fixed-width font below it."""
        self.text(x, y, title, bold=True, anchor=anchor)
        for number, note in enumerate(notes, start=1):
            self.text(x, y + 15 * number, note, size=11, color=GREY, font=MONO, anchor=anchor)

    def arrow(self, *points: tuple[int, int], color: str = INK, width: float = 1.6) -> None:
        """A line through the points with a head at the last one."""
        path = " ".join(f"{'L' if number else 'M'} {x} {y}" for number, (x, y) in enumerate(points))
        marker = "types" if color == TYPES else "data"
        self.elements.append(
            f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{width}" '
            f'stroke-linejoin="round" marker-end="url(#{marker})"/>'
        )

    def svg(self) -> str:
        """The whole picture on a white ground, which dark pages need."""
        heads = "".join(
            f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M 0 0 L 10 5 L 0 10 z" fill="{color}"/>'
            "</marker>"
            for name, color in (("data", INK), ("types", TYPES))
        )
        body = "\n".join(self.elements)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'width="{WIDTH}" height="{HEIGHT}">\n<defs>{heads}</defs>\n'
            f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="#ffffff"/>\n{body}\n</svg>\n'
        )


def data(d: Drawing) -> None:
    """The first row: from files to a micro-batch."""
    steps = (
        (24, "LLaVA records, images", "data/records/"),
        (272, "encode", "data/encode/"),
        (520, "order, pack, collate", "data/stream/"),
    )
    for x, title, file in steps:
        d.box(x, 20, 208, 50)
        d.label(x + 104, 40, title, file)
        d.arrow((x + 208, 45), (x + 246, 45))
    d.box(768, 20, 208, 90)
    d.label(872, 40, "Batch", "tokens, labels (b, s)", "images (i, 3, H, W)")
    d.text(872, 96, "token types (b, s)", size=11, font=MONO, color=TYPES, bold=True)


def inputs(d: Drawing) -> None:
    """What MoIIEModel takes of a batch besides the token types."""
    d.arrow((768, 86), (180, 86), (180, 194))
    d.arrow((768, 98), (234, 98), (234, 332), (222, 332))
    for x, y, words in ((744, 81, "images"), (744, 112, "tokens")):
        d.text(x, y, words, size=11, color=GREY, font=MONO, anchor="end")


def megatron(d: Drawing) -> None:
    """Megatron's modules, each inside the one that calls it."""
    modules = (
        (248, 150, 712, 372, "GPTModel", "models/gpt/gpt_model.py"),
        (266, 186, 676, 254, "TransformerBlock", "transformer/transformer_block.py"),
        (284, 222, 640, 204, "TransformerLayer", "transformer/transformer_layer.py"),
    )
    for x, y, w, h, title, file in modules:
        d.box(x, y, w, h, MEGATRON, MEGATRON_LINE)
        d.text(x + 16, y + 23, title, bold=True, anchor="start")
        d.text(x + w - 16, y + 23, file, size=11, color=GREY, font=MONO, anchor="end")
    d.box(302, 320, 100, 50, "#ffffff", MEGATRON_LINE)
    d.label(352, 350, "attention")
    for y, words in ((392, "layers without"), (408, "experts: MLP")):
        d.text(352, y, words, size=11, color=GREY)
    d.box(612, 456, 330, 52, "#ffffff", MEGATRON_LINE)
    d.label(777, 477, "output layer, cross-entropy", "logits only where there is a label")


def moe_layer(d: Drawing) -> None:
    """The four steps inside MoIIELayer."""
    d.box(436, 258, 470, 154)
    d.text(484, 281, "MoIIELayer", bold=True, anchor="start")
    d.text(890, 281, "moe/layer.py", size=11, color=GREY, font=MONO, anchor="end")
    steps = (
        (452, "router", "router.py"),
        (567, "dispatch", "dispatcher.py"),
        (682, "experts", "V | S S | T"),
        (797, "combine", "dispatcher.py"),
    )
    for x, title, note in steps:
        d.box(x, 320, 93, 50, "#ffffff")
        d.label(x + 46, 340, title, note)
    for x in (545, 660, 775):
        d.arrow((x, 345), (x + 20, 345))
    d.text(890, 398, "image tokens: V or S;  text tokens: T or S", size=12, anchor="end")


def model(d: Drawing) -> None:
    """MoIIEModel around Megatron's GPTModel."""
    d.box(24, 136, 952, 400, "#f5f9ff")
    d.label(40, 159, "MoIIEModel", "vlm/model.py", anchor="start")
    parts = (
        (196, "vision encoder", "vlm/vision.py"),
        (258, "connector", "vlm/connector.py"),
        (320, "merge with text", "vlm/merge.py"),
    )
    for y, title, file in parts:
        d.box(44, y, 176, 46)
        d.label(132, y + 20, title, file)
    d.arrow((132, 242), (132, 256))
    d.arrow((132, 304), (132, 318))
    megatron(d)
    moe_layer(d)
    d.arrow((220, 345), (300, 345))
    d.arrow((402, 345), (450, 345))
    d.arrow((843, 370), (843, 384), (918, 384), (918, 448), (843, 448), (843, 454))
    d.text(257, 362, "(s, b, h)", size=11, color=GREY, font=MONO)


def results(d: Drawing) -> None:
    """The last row: what a step makes of the outputs."""
    d.box(24, 560, 270, 52)
    d.label(159, 581, "routing statistics", "routing_stats/, routing.jsonl")
    d.box(326, 560, 280, 52)
    d.label(466, 581, "loss + alpha * balance losses", "training/step.py, moe/losses.py")
    d.box(638, 560, 338, 52, MEGATRON, MEGATRON_LINE)
    d.label(807, 581, "gradient reduction, optimizer", "distributed/, optimizer/")
    d.arrow((640, 508), (640, 526), (560, 526), (560, 558))
    d.arrow((498, 370), (498, 558))
    d.arrow((498, 542), (159, 542), (159, 558))
    d.arrow((606, 586), (636, 586))


def token_types(d: Drawing) -> None:
    """The way of the token types, which Megatron carries as ``padding_mask``."""
    d.arrow((872, 110), (872, 123), (468, 123), (468, 318), color=TYPES, width=2.6)
    for y in (173, 209, 245):
        d.text(478, y, "padding_mask", size=11, font=MONO, color=TYPES, anchor="start")
    d.text(478, 309, "token types", size=11, font=MONO, color=TYPES, anchor="start")


def legend(d: Drawing) -> None:
    """Whose code a colour stands for."""
    d.box(24, 632, 26, 16)
    d.text(58, 645, "this project (moiie_megatron/)", size=12, anchor="start")
    d.box(280, 632, 26, 16, MEGATRON, MEGATRON_LINE)
    d.text(314, 645, "Megatron-Core (megatron/core/), unchanged", size=12, anchor="start")
    d.arrow((612, 640), (644, 640), color=TYPES, width=2.6)
    d.text(654, 645, "token types, from the batch to every router", size=12, anchor="start")


def main() -> None:
    """Write the picture beside this file."""
    Path(__file__).with_suffix(".svg").write_text(picture(), encoding="ascii")


def picture() -> str:
    """The SVG."""
    drawing = Drawing()
    for part in (data, model, inputs, results, token_types, legend):
        part(drawing)
    return drawing.svg()


if __name__ == "__main__":
    main()
