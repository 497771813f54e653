"""How many parameters a run has, in all and per token: arithmetic, no weights and no torch.

Vocabulary padding is left out, so the numbers are those of the exported Hugging Face model.
"""

from __future__ import annotations

from dataclasses import dataclass

from moiie_megatron.config.schema import LanguageConfig, RunConfig, VisionConfig

_ROWS = (
    ("vision", "vision encoder"),
    ("connector", "connector"),
    ("embedding", "embedding"),
    ("attention", "attention"),
    ("dense_ffn", "dense FFN"),
    ("experts", "experts"),
    ("routers", "routers"),
    ("norms", "norms"),
    ("output_layer", "output layer"),
)


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by part.

    Attributes:
        vision: The whole encoder, layers after ``vision.feature_layer`` included.
        connector: Both linear layers, with biases.
        embedding: Token embedding.
        attention: Projections of all layers.
        dense_ffn: FFNs of the layers without experts.
        experts: All experts of all layers.
        active_experts: Those of them that one token runs through.
        routers: All routers; every one of them is computed for every token.
        norms: Norms of the language model.
        output_layer: 0 with tied embeddings.
    """

    vision: int
    connector: int
    embedding: int
    attention: int
    dense_ffn: int
    experts: int
    active_experts: int
    routers: int
    norms: int
    output_layer: int

    @property
    def total(self) -> int:
        return sum(getattr(self, name) for name, _ in _ROWS)

    @property
    def activated(self) -> int:
        """The paper's "activated parameters": each MoE layer counts ``top_k`` of its experts."""
        return self.total - self.experts + self.active_experts


def count_parameters(config: RunConfig) -> ParameterCount:
    """Count the model that ``config`` trains; with ``stage.moe`` false that is the dense one."""
    language, layout = config.language, config.moe.layout
    hidden = language.hidden_size
    num_moe = len(config.moe_layers)
    ffn = 3 * hidden * language.ffn_hidden_size  # gate, up, down; no biases
    router_rows = sum(len(layout.allowed(router)) for router in layout.routers)
    vocabulary = language.vocab_size * hidden
    return ParameterCount(
        vision=_vision(config.vision),
        connector=_connector(config),
        embedding=vocabulary,
        attention=language.num_layers * _attention(language),
        dense_ffn=(language.num_layers - num_moe) * ffn,
        experts=num_moe * layout.num_experts * ffn,
        active_experts=num_moe * layout.top_k * ffn,
        routers=num_moe * router_rows * hidden,
        norms=(2 * language.num_layers + 1) * hidden,
        output_layer=0 if language.tied_embeddings else vocabulary,
    )


def format_parameters(count: ParameterCount) -> str:
    """A table with one line per part that has parameters, then activated and total."""
    total = count.total
    lines = [
        f"{label:<16}{_short(number):>9}{number / total:>8.1%}"
        for name, label in _ROWS
        if (number := getattr(count, name))
    ]
    lines.append(f"{'activated':<16}{_short(count.activated):>9}{count.activated / total:>8.1%}")
    lines.append(f"{'total':<16}{_short(total):>9}{1:>8.1%}")
    return "\n".join(lines)


def _attention(language: LanguageConfig) -> int:
    """Query, key, value and output projections of one layer; no biases."""
    hidden = language.hidden_size
    key_value = hidden // language.num_attention_heads * language.num_query_groups
    return 2 * hidden * hidden + 2 * hidden * key_value


def _connector(config: RunConfig) -> int:
    out = config.language.hidden_size
    width = config.connector.hidden_size or out
    return _linear(config.vision.hidden_size, width) + _linear(width, out)


def _vision(vision: VisionConfig) -> int:
    """transformers' SiglipVisionModel without pooling head, or CLIPVisionModel."""
    hidden, patches = vision.hidden_size, vision.num_image_tokens
    norm = 2 * hidden
    layer = (
        4 * _linear(hidden, hidden)
        + _linear(hidden, vision.ffn_hidden_size)
        + _linear(vision.ffn_hidden_size, hidden)
        + 2 * norm
    )
    patch_weights = 3 * vision.patch_size**2 * hidden
    if vision.family == "siglip":
        ends = patch_weights + hidden + patches * hidden + norm
    else:
        # CLIP: a class token with its own position, no bias on patches, norms at both ends.
        ends = patch_weights + hidden + (patches + 1) * hidden + 2 * norm
    return vision.num_layers * layer + ends


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _short(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)
