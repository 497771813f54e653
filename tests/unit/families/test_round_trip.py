"""Every family of the registry from Hugging Face files to a checkpoint and back, and as a model
that transformers runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moiie_megatron.config.families import LANGUAGE_FAMILIES
from moiie_megatron.convert.export import export_checkpoint
from moiie_megatron.convert.import_hf import import_checkpoint
from moiie_megatron.convert.open_model import open_weights
from moiie_megatron.convert.upcycle import UpcycleOptions, upcycle_checkpoint
from moiie_megatron.convert.verify import compare_tensors
from moiie_megatron.families.registry import language_family
from moiie_megatron.hf.modeling_moiie import MoiieForConditionalGeneration
from moiie_megatron.utils.digest import same_bytes
from tests.helpers.tiny_hf import write_language, write_vision

DENSE = [name for name in LANGUAGE_FAMILIES if not language_family(name).has_experts]
# What a family has that others do not.
SPECIAL: dict[str, dict[str, Any]] = {
    "mistral": {"head_dim": 16, "sliding_window": 3},
    "mixtral": {"num_local_experts": 4, "sliding_window": 3},
    "qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0},
    "qwen3": {"head_dim": 16},
}
# Far from linear: what is computed in another way shows.
STD = {"initializer_range": 0.2}


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vision(tmp_path_factory.mktemp("vision"))


def _language(folder: Path, family: str, **changes: Any) -> Path:
    values = {**SPECIAL.get(family, {}), **STD, **changes}
    return write_language(folder, family, torch.float32, random_vectors=True, **values)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("family", DENSE)
def test_there_and_back(family: str, is_tied: bool, vision: Path, tmp_path: Path) -> None:
    """Bit for bit, and in transformers' hands the same model, also while it generates."""
    llm = _language(tmp_path / "llm", family, tie_word_embeddings=is_tied)
    options = UpcycleOptions(variant="dense")
    checkpoint = upcycle_checkpoint(llm, vision, tmp_path / "checkpoint", options)
    out = export_checkpoint(checkpoint, tmp_path / "out")
    want, got = (load_file(folder / "model.safetensors") for folder in (llm, out))
    start = "model.language_model."
    back = {name.replace(start, "model."): tensor for name, tensor in got.items()}
    back = {name: tensor for name, tensor in back.items() if name in want}
    assert set(back) == set(want)
    assert all(same_bytes(back[name], tensor) for name, tensor in want.items())
    _assert_same_model(out, llm)


@pytest.mark.parametrize("variant", ["vanilla", "modality", "moiie"])
@pytest.mark.parametrize("family", DENSE)
def test_upcycled_there_and_back(family: str, variant: Any, vision: Path, tmp_path: Path) -> None:
    """Equal to its parent in transformers' hands; with experts apart, every tensor comes back."""
    llm = _language(tmp_path / "llm", family)
    options = UpcycleOptions(variant=variant)
    checkpoint = upcycle_checkpoint(llm, vision, tmp_path / "checkpoint", options)
    _assert_same_model(export_checkpoint(checkpoint, tmp_path / "equal"), llm)
    options = UpcycleOptions(variant=variant, perturb=0.3)
    checkpoint = upcycle_checkpoint(llm, vision, checkpoint, options, force=True)
    out = export_checkpoint(checkpoint, tmp_path / "out")
    again = import_checkpoint(out, tmp_path / "again").folder
    report = compare_tensors(open_weights(checkpoint), open_weights(again))
    assert report.is_equal and report.compared > 50 and not report.other_dtype, report.lines()


def test_pretrained_experts(vision: Path, tmp_path: Path) -> None:
    """Also behind a sliding window, which the exported decoder has, too."""
    llm = _language(tmp_path / "llm", "mixtral")
    options = UpcycleOptions(variant="vanilla")
    checkpoint = upcycle_checkpoint(llm, vision, tmp_path / "checkpoint", options)
    assert compare_tensors(open_weights(llm), open_weights(checkpoint)).is_equal
    _assert_same_model(export_checkpoint(checkpoint, tmp_path / "out"), llm)


@torch.no_grad()
def _assert_same_model(exported: Path, parent: Path) -> None:
    """The same logits and the same words."""
    model = MoiieForConditionalGeneration.from_pretrained(exported).eval()
    dense: Any = AutoModelForCausalLM.from_pretrained(parent).eval()
    # Id 4, behind the tokenizer, stands for images.
    ids = torch.randint(5, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    want, got = dense(ids).logits, model(ids).logits[..., : dense.config.vocab_size]
    assert want.std() > 0.3
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(_greedy(model, ids), _greedy(dense, ids))


def _greedy(model: Any, ids: Tensor) -> Tensor:
    words: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, eos_token_id=-1
    )
    return words
