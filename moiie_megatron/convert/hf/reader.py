"""Megatron tensors out of Hugging Face directories, one at a time and without Megatron."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from torch import Tensor

from moiie_megatron.config.schema import LanguageConfig, VisionConfig
from moiie_megatron.convert.hf.config import read_config
from moiie_megatron.convert.hf.image_row import added_rows, drop_rows
from moiie_megatron.convert.hf.name_layouts import open_language
from moiie_megatron.convert.hf.weights_file import SAFETENSORS, TORCH
from moiie_megatron.convert.hf.weights_source import WeightsSource
from moiie_megatron.convert.tensor_bytes import TensorBytes, transformed
from moiie_megatron.families import weight_map
from moiie_megatron.families.registry import language_family
from moiie_megatron.families.transforms import TensorInfo
from moiie_megatron.families.weight_map import WeightMapping
from moiie_megatron.layout.experts import ExpertLayout
from moiie_megatron.utils.errors import UserError

_PATCHES = "embeddings.patch_embedding.weight"

# Buffers of older transformers versions, and the vision tower of a composed checkpoint, which
# is read by itself.
_NOT_LANGUAGE = (r"\.rotary_emb\.inv_freq$", r"(^|\.)vision_tower\.")
# A buffer, and a pooling head: patch features are all that the language model sees.
_NOT_FEATURES = (r"embeddings\.position_ids$", r"^head\.")


class HfReader:
    """Megatron tensors out of a source, by the rows of a table.

    The last tensor is kept, so that the experts of a layer share one dense FFN.

    Raises:
        UserError: A tensor of the table that the source does not have.
    """

    def __init__(self, source: WeightsSource, rows: Collection[WeightMapping]) -> None:
        self.source = source
        self._rows = {(row.megatron, row.expert): row for row in rows}
        self._last: tuple[WeightMapping, Tensor] | None = None
        self._last_bytes: tuple[WeightMapping, TensorBytes] | None = None
        missing = [name for row in rows for name in row.hf if name not in source]
        if missing:
            source.get(missing[0])  # says which, before anything is loaded

    def get(self, name: str, expert: int | None) -> Tensor | None:
        """The full tensor of a Megatron name and, for experts, a logical id.

        Returns:
            None for routers and connectors that the source has nothing for.
        """
        row = self.row(name, expert)
        if row is None:
            assert weight_map.ROUTER in name or name.startswith(weight_map.CONNECTOR), name
            return None
        if self._last is None or self._last[0] is not row:
            self._last = None  # let go of it before the next is read
            parts = [self.source.get(hf) for hf in row.hf]
            self._last = (row, row.transform.to_megatron(parts))
        return self._last[1]

    def get_bytes(self, name: str, expert: int | None) -> TensorBytes | None:
        """The bytes of what ``get`` gives: in the source's files where they lie there in order.

        Experts that share a dense FFN get the same object, so it is hashed once.
        """
        row = self.row(name, expert)
        if row is None:
            return None
        if self._last_bytes is None or self._last_bytes[0] is not row:
            self._last_bytes = None  # let go of it before the next is read
            parts = [self.source.get_bytes(hf) for hf in row.hf]
            to_megatron = row.transform.to_megatron
            self._last_bytes = (row, transformed(lambda parts: [to_megatron(parts)], parts)[0])
        return self._last_bytes[1]

    def info(self, name: str, expert: int | None) -> TensorInfo | None:
        """Shape and dtype of what ``get`` gives, without reading it."""
        row = self.row(name, expert)
        if row is None:
            return None
        parts = [self.source.info(hf).meta() for hf in row.hf]
        try:
            return TensorInfo.of(row.transform.to_megatron(parts))
        except RuntimeError as error:
            shapes = ", ".join(
                f"{hf} {tuple(p.shape)}" for hf, p in zip(row.hf, parts, strict=True)
            )
            raise UserError(
                f"Tensors in {self.source.directory} do not fit together ({shapes}): use weights "
                "of the configured architecture."
            ) from error

    def row(self, name: str, expert: int | None) -> WeightMapping | None:
        """What a tensor is made from; a MoE tensor without a row is a copy of a dense one."""
        return self._rows.get((name, expert)) or self._rows.get((weight_map.dense_name(name), None))


def language_reader(
    language: LanguageConfig,
    layout: ExpertLayout,
    moe_layers: Sequence[int],
    directory: str | Path,
    ignored: Iterable[str] = (),
) -> HfReader:
    """The language model in a directory, and a connector where the directory has one.

    Args:
        layout: The experts, where the directory has any.
        moe_layers: Layers with experts, where the directory has any.
        ignored: Regular expressions of further names that are no loss.

    Raises:
        UserError: Files or tensors that are missing, unreadable or superfluous.
    """
    source, naming = open_language(directory, language_family(language.family))
    has_experts = any(".experts." in name for name in source.names)
    rows = weight_map.language_rows(language, layout, moe_layers if has_experts else [], naming)
    if any(name.startswith(naming.connector) for name in source.names):
        rows += weight_map.connector_rows(naming.connector, naming.connector_layers)
    ignored = [*_NOT_LANGUAGE, *ignored]
    if language.tied_embeddings:
        ignored.append(r"^lm_head\.weight$")  # some writers store the tied matrix twice
    refuse_unused(source.names, _known(rows), ignored, str(directory))
    added = added_rows(read_config(directory)[1])
    for row in rows:
        if row.megatron in weight_map.VOCABULARY:
            drop_rows(source, row.hf[0], added)
    return HfReader(source, rows)


def vision_reader(vision: VisionConfig, directory: str | Path) -> HfReader:
    """The tower by itself, or inside a checkpoint that holds more than it (a text tower...).

    Raises:
        UserError: Files or tensors that are missing, unreadable or superfluous.
    """
    source = WeightsSource(directory)
    prefixes = [name.removesuffix(_PATCHES) for name in source.names if name.endswith(_PATCHES)]
    if len(prefixes) != 1:
        raise UserError(
            f"{directory} holds {len(prefixes)} vision towers (tensors named ...{_PATCHES}): give "
            f"a directory with one {vision.family} model."
        )
    rows = weight_map.vision_rows(vision, prefixes[0])
    of_tower = [
        name.removeprefix(prefixes[0]) for name in source.names if name.startswith(prefixes[0])
    ]
    known = {name.removeprefix(prefixes[0]) for name in _known(rows)}
    refuse_unused(of_tower, known, _NOT_FEATURES, str(directory))
    return HfReader(source, rows)


def connector_reader(path: str | Path) -> HfReader:
    """The connector in a file (safetensors or ``.bin``) or in a directory.

    In a directory it is LLaVA's ``mm_projector.bin``, or among the weights of a whole model.

    Its names may have any prefix; its layers are called ``0`` and ``2`` as in LLaVA, or
    ``linear_1`` and ``linear_2``.

    Raises:
        UserError: It is unreadable or holds no such connector.
    """
    alone = (Path(path) / f"mm_projector{ending}" for ending in (SAFETENSORS, *TORCH))
    source = WeightsSource(next((file for file in alone if file.is_file()), path))
    for naming in (weight_map.REFERENCE, weight_map.EXPORTED):
        first, second = (f"{layer}.weight" for layer in naming.connector_layers)
        prefixes = [
            name.removesuffix(first)
            for name in source.names
            if name.endswith(first) and name.removesuffix(first) + second in source
        ]
        # "0.weight" also ends longer names: a connector's parts stand right behind the prefix.
        prefixes = [prefix for prefix in prefixes if not prefix or prefix.endswith(".")]
        if len(prefixes) == 1:
            return HfReader(source, weight_map.connector_rows(prefixes[0], naming.connector_layers))
    raise UserError(
        f"{path} holds no connector: it needs 0.weight and 2.weight, or linear_1.weight and "
        "linear_2.weight, under one prefix."
    )


def _known(rows: Iterable[WeightMapping]) -> set[str]:
    return {name for row in rows for name in row.hf}


def refuse_unused(
    present: Iterable[str], known: Collection[str], ignored: Iterable[str], source: str
) -> None:
    """Refuse a source with tensors that the model has no place for.

    ``known`` comes from the name tables, not from what this rank asked for: a rank asks only
    for its own layers and experts.

    Args:
        present: Names in the source.
        known: Names that the tables read.
        ignored: Regular expressions (``re.search``) of names that are no loss.
        source: File or folder, for the message.

    Raises:
        UserError: Names a few of the tensors.
    """
    patterns = [re.compile(pattern) for pattern in ignored]
    extra = sorted(
        name
        for name in set(present) - set(known)
        if not any(pattern.search(name) for pattern in patterns)
    )
    if adapter := next((name for name in extra if ".lora_" in name), None):
        raise UserError(
            f"{source} holds a LoRA adapter ({adapter}) beside the weights: merge it with peft's "
            "merge_and_unload, and save the result."
        )
    if extra:
        more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
        raise UserError(
            f"{source} holds tensors that the model has no place for ({', '.join(extra[:3])}"
            f"{more}): use weights of the configured architecture."
        )
