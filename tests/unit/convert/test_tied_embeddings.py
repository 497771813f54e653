"""Tied embeddings beside a stored output layer: the weights decide, as in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moiie_megatron.convert.dcp.reader import CheckpointReader
from moiie_megatron.convert.export import export_checkpoint
from moiie_megatron.convert.hf.config import is_untied_by_weights, read_language_config
from moiie_megatron.convert.import_hf import import_checkpoint
from moiie_megatron.convert.open_model import open_weights
from moiie_megatron.convert.upcycle import upcycle_checkpoint
from moiie_megatron.convert.verify import compare_tensors
from moiie_megatron.families.weight_map import OUTPUT_LAYER
from tests.helpers.tiny_hf import write_language, write_vision


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vision(tmp_path_factory.mktemp("vision"))


def add_output_layer(folder: Path, kind: str) -> Tensor:
    """Store an output layer although config.json says that it is tied."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("embed_tokens.weight"))
    head = weights[name].clone()
    if kind == "one value":
        head[-1, -1] += 1
    elif kind == "all values":
        head = torch.randn_like(head)
    elif kind == "equal in another dtype":
        head = head.float()
    save_file(weights | {"lm_head.weight": head}, file, {"format": "pt"})
    return head


KINDS = {
    "equal": True,
    "equal in another dtype": True,
    "one value": False,
    "all values": False,
}


@pytest.mark.parametrize("kind", KINDS)
def test_upcycling(kind: str, vision: Path, tmp_path: Path) -> None:
    llm = write_language(tmp_path / "llm", tie_word_embeddings=True)
    assert read_language_config(llm).tied_embeddings
    head = add_output_layer(llm, kind)
    checkpoint = upcycle_checkpoint(llm, vision, tmp_path / "checkpoint")
    reader = CheckpointReader(checkpoint)
    assert reader.config.language.tied_embeddings == KINDS[kind]
    assert (OUTPUT_LAYER in reader.tensors) != KINDS[kind]
    assert is_untied_by_weights(reader.config.language, llm) != KINDS[kind]
    if not KINDS[kind]:
        assert torch.equal(reader.get(OUTPUT_LAYER), head)
    assert compare_tensors(open_weights(llm), open_weights(checkpoint)).is_equal


@pytest.mark.parametrize("kind", KINDS)
def test_importing(kind: str, vision: Path, tmp_path: Path) -> None:
    """An export whose config.json ties, and whose file somebody has added an output layer to."""
    llm = write_language(tmp_path / "llm", tie_word_embeddings=True)
    checkpoint = upcycle_checkpoint(llm, vision, tmp_path / "checkpoint")
    export = export_checkpoint(checkpoint, tmp_path / "export")
    assert json.loads((export / "config.json").read_text())["tie_word_embeddings"]
    head = add_output_layer(export, kind)
    imported = import_checkpoint(export, tmp_path / "imported")
    reader = CheckpointReader(imported.folder)
    assert reader.config.language.tied_embeddings == KINDS[kind]
    assert any("lm_head.weight differs" in note for note in imported.notes) != KINDS[kind]
    if not KINDS[kind]:
        assert torch.equal(reader.get(OUTPUT_LAYER), head)


def test_a_bin_folder_stores_the_tied_matrix_twice(vision: Path, tmp_path: Path) -> None:
    """As ``save_pretrained(safe_serialization=False)`` does."""
    llm = write_language(tmp_path / "llm", tie_word_embeddings=True)
    plain = upcycle_checkpoint(llm, vision, tmp_path / "plain")
    file = llm / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    torch.save(weights, llm / "pytorch_model.bin")
    file.unlink()
    checkpoint = upcycle_checkpoint(llm, vision, tmp_path / "checkpoint")
    assert compare_tensors(open_weights(plain), open_weights(checkpoint)).is_equal
    report = json.loads((checkpoint / "conversion_report.json").read_text())
    assert any("pytorch_model.bin" in str(source) for source in report["sources"])
