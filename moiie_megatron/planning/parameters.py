"""How many parameters a run has, in all and per token: arithmetic, no weights and no torch.

Vocabulary padding is left out, so the numbers are those of the exported Hugging Face model.
"""

from __future__ import annotations

from dataclasses import dataclass

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.families.weight_map import EMBEDDING, OUTPUT_LAYER, WeightMapping, model_rows

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
        attention: Projections of all layers, with biases where the family has them.
        dense_ffn: FFNs of the layers without experts.
        experts: All experts of all layers.
        active_experts: Those of them that one token runs through.
        routers: All routers; every one of them is computed for every token.
        norms: Norms of the language model, those of queries and keys included.
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
    counts = dict.fromkeys((name for name, _ in _ROWS), 0)
    for row in model_rows(config):
        counts[_part(row)] += row.num_parameters
    layout = config.moe.layout
    # All experts of a layer are alike.
    active = counts["experts"] * layout.top_k // layout.num_experts if config.moe_layers else 0
    return ParameterCount(active_experts=active, **counts)


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


def _part(row: WeightMapping) -> str:
    """What a tensor is counted as."""
    name = row.megatron
    if row.part != "language":
        return row.part
    if name in (EMBEDDING, OUTPUT_LAYER):
        return "embedding" if name == EMBEDDING else "output_layer"
    if "norm" in name:
        return "norms"
    return "attention" if ".self_attention." in name else "dense_ffn"


def _short(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)
