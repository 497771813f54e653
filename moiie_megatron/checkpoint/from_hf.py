"""Start from Hugging Face weights: language model, vision encoder, or both.

A MoE model starts from a dense language model by upcycling while it loads: every rank takes its
own experts from the dense FFN (paper, section 3).
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from moiie_megatron.checkpoint import tables
from moiie_megatron.checkpoint.assign import assign, refuse_unused
from moiie_megatron.checkpoint.hf_config import check_language_config, check_vision_config
from moiie_megatron.checkpoint.source import SafetensorsSource
from moiie_megatron.checkpoint.tables import Row
from moiie_megatron.checkpoint.upcycle import dense_name
from moiie_megatron.config.schema import RunConfig, VisionConfig
from moiie_megatron.multimodal.model import MoIIEModel

_CONNECTOR_PREFIX = "model.mm_projector."
_PATCHES = "embeddings.patch_embedding.weight"

# Buffers of older transformers versions, and the vision tower of a composed checkpoint, which
# `vision.pretrained` reads.
_NOT_LANGUAGE = (r"\.rotary_emb\.inv_freq$", r"(^|\.)vision_tower\.")
# A buffer, and SigLIP's pooling head: patch features are all that the language model sees.
_NOT_FEATURES = (r"embeddings\.position_ids$", r"^head\.")


def load_pretrained(model: MoIIEModel, config: RunConfig) -> list[str]:
    """Fill the model from ``language.pretrained`` and ``vision.pretrained``, where set.

    Without counterpart in the sources, routers and connector keep their fresh weights.  Every
    rank reads what it needs; there is no communication.

    Returns:
        The names on this rank that kept their fresh weights, sorted.

    Raises:
        ValueError: A directory, file or tensor that is missing, unreadable, superfluous or of
            another architecture than the run's.
    """
    readers: dict[str, _Reader] = {}
    if config.language.pretrained is not None:
        reader = _language_reader(config, config.language.pretrained)
        readers[tables.LANGUAGE] = readers[tables.CONNECTOR] = reader
    if config.vision.pretrained is not None:
        readers[tables.VISION] = _vision_reader(config.vision, config.vision.pretrained)

    def get(name: str, expert: int | None) -> Tensor | None:
        for prefix, reader in readers.items():
            if name.startswith(prefix):
                return reader.get(name, expert)
        return None

    return assign(model, get)


class _Reader:
    """Megatron tensors out of a source, by the rows of a table."""

    def __init__(self, source: SafetensorsSource, rows: Collection[Row]) -> None:
        self._source = source
        self._rows = {(row.megatron, row.expert): row for row in rows}
        self._last: tuple[Row, Tensor] | None = None
        missing = [name for row in rows for name in row.hf if name not in source]
        if missing:
            source.get(missing[0])  # says which, before anything is loaded

    def get(self, name: str, expert: int | None) -> Tensor | None:
        # A MoE tensor without a row is a copy of a dense one; a router has nothing to copy.
        row = self._rows.get((name, expert)) or self._rows.get((dense_name(name), None))
        if row is None:
            assert tables.ROUTER in name or name.startswith(tables.CONNECTOR), name
            return None
        if self._last is None or self._last[0] is not row:  # all experts of a layer: read once
            self._last = None
            parts = [self._source.get(hf) for hf in row.hf]
            self._last = (row, row.surgery.to_megatron(parts))
        return self._last[1]


def _language_reader(config: RunConfig, directory: str) -> _Reader:
    check_language_config(config.language, directory)
    source = SafetensorsSource(directory)
    has_experts = any(".mlp.experts." in name for name in source.names)
    moe_layers = config.moe_layers if has_experts else []
    rows = tables.language_rows(config.language, config.moe.layout, moe_layers)
    if any(name.startswith(_CONNECTOR_PREFIX) for name in source.names):
        rows += tables.connector_rows(_CONNECTOR_PREFIX)
    ignored = list(_NOT_LANGUAGE)
    if config.language.tied_embeddings:
        ignored.append(r"^lm_head\.weight$")  # some writers store the tied matrix twice
    known = {name for row in rows for name in row.hf}
    refuse_unused(source.names, known, ignored, directory)
    return _Reader(source, rows)


def _vision_reader(vision: VisionConfig, directory: str) -> _Reader:
    """The tower by itself, or inside a checkpoint that holds more than it (a text tower...)."""
    check_vision_config(vision, directory)
    source = SafetensorsSource(directory)
    prefixes = [name.removesuffix(_PATCHES) for name in source.names if name.endswith(_PATCHES)]
    if len(prefixes) != 1:
        raise ValueError(
            f"{directory} holds {len(prefixes)} vision towers (tensors named ...{_PATCHES}): give "
            f"a directory with one {vision.family} model."
        )
    rows = tables.vision_rows(vision, prefixes[0])
    of_tower = [
        name.removeprefix(prefixes[0]) for name in source.names if name.startswith(prefixes[0])
    ]
    known = {name.removeprefix(prefixes[0]) for row in rows for name in row.hf}
    refuse_unused(of_tower, known, _NOT_FEATURES, directory)
    return _Reader(source, rows)
