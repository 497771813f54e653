"""Are the embeddings of a directory really tied, as its ``config.json`` says?

Some writers store the output layer although it is tied.  Where it has other values than the
embeddings, transformers warns and does not tie, and neither may we: the weights decide.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch

from moiie_megatron.convert.hf.name_layouts import open_language
from moiie_megatron.convert.hf.weights_source import WeightsSource, weights_files
from moiie_megatron.utils.errors import UserError

OUTPUT_LAYER: Final = "lm_head.weight"
_EMBEDDING: Final = "embed_tokens.weight"


def has_own_output_layer(directory: str | Path) -> bool:
    """Whether the weights hold an output layer with other values than the embeddings.

    Raises:
        UserError: As ``WeightsSource``, where there are weights.
    """
    try:
        weights_files(Path(directory))
    except UserError:
        return False  # a configuration alone; whoever reads the weights says what is missing
    source, naming = open_language(directory)
    embedding = naming.language + _EMBEDDING
    if OUTPUT_LAYER not in source or embedding not in source:
        return False
    return not _are_equal(source, OUTPUT_LAYER, embedding)


def _are_equal(source: WeightsSource, a: str, b: str) -> bool:
    infos = [source.info(name) for name in (a, b)]
    if infos[0] == infos[1]:
        return source.get_bytes(a).digest == source.get_bytes(b).digest
    if infos[0].shape != infos[1].shape:
        return False
    return torch.equal(source.get(a).float(), source.get(b).float())
