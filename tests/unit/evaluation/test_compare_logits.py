"""Logits of two models on disk, through transformers and through our own model."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moiie_megatron.convert.export import export_checkpoint
from moiie_megatron.convert.open_model import open_weights
from moiie_megatron.convert.upcycle import UpcycleOptions, upcycle_checkpoint
from moiie_megatron.evaluation.compare_logits import LogitDifference, compare_logits, make_inputs
from moiie_megatron.mcore.parallel import destroy_parallel
from tests.helpers.tiny_hf import write_language, write_vision
from tests.helpers.user_errors import user_error


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """No process group around it."""
    destroy_parallel()
    torch.set_num_threads(1)
    yield
    destroy_parallel()


@pytest.fixture(autouse=True, scope="module")
def _code_of_exports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers copies it to and imports it from, for these tests alone."""
    cache = "transformers.dynamic_module_utils.HF_MODULES_CACHE"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, str(tmp_path_factory.mktemp("modules")))
        # Tests before these may have imported from another place, which would be found first.
        places = [place for place in sys.path if not Path(place, "transformers_modules").is_dir()]
        patch.setattr(sys, "path", places)
        _forget_code()
        yield
        _forget_code()


def _forget_code() -> None:
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``llm`` and ``vision`` -> ``checkpoint`` -> ``export``; weights large enough to matter."""
    folder = tmp_path_factory.mktemp("models")
    llm = write_language(folder / "llm", initializer_range=0.3, max_position_embeddings=40)
    options = UpcycleOptions(perturb=0.5)
    for name, given in (("copied", UpcycleOptions()), ("checkpoint", options)):
        upcycle_checkpoint(llm, write_vision(folder / "vision"), folder / name, given)
    export_checkpoint(folder / "checkpoint", folder / "export")
    return folder


def _compare(a: Path, b: Path) -> tuple[dict[str, LogitDifference], list[str]]:
    differences, skipped = compare_logits(open_weights(a), open_weights(b))
    return {d.name: d for d in differences}, skipped


def _changed(directory: Path, copy: Path, part: str) -> Path:
    """A copy of an export in which the tensors whose names hold ``part`` are turned round."""
    shutil.copytree(directory, copy)
    tensors = load_file(copy / "model.safetensors")
    names = [name for name in tensors if part in name]
    assert names
    for name in names:
        tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


def test_checkpoint_and_export_agree(models: Path) -> None:
    found, skipped = _compare(models / "checkpoint", models / "export")
    assert skipped == [] and set(found) == {"text", "image + text"}
    for difference in found.values():
        assert difference.maximum < 1e-5 and difference.top1 == 1
    # 2 rows of 32; 4 image tokens and 32 of text
    assert [d.positions for d in found.values()] == [64, 36]


def test_a_dense_model_and_what_it_became(models: Path) -> None:
    found, skipped = _compare(models / "llm", models / "copied")
    assert set(found) == {"text"} and found["text"].maximum < 1e-5
    assert skipped == ["logits, image + text: skipped, A is a language model alone"]
    with_noise = _compare(models / "export", models / "llm")[0]["text"]
    assert with_noise.maximum > 0.1 and with_noise.top1 < 1


@pytest.mark.parametrize(
    ("part", "moves_text"),
    [
        ("vision_tower.encoder.layers.0.mlp.fc1", False),
        ("layers.1.mlp.gate_vis.", False),
        ("layers.1.mlp.experts.0.", False),  # the vision expert
        ("layers.1.mlp.experts.3.", True),
        ("layers.2.self_attn.q_proj", True),
    ],
)
def test_every_part_is_felt(models: Path, tmp_path: Path, part: str, moves_text: bool) -> None:
    found, _ = _compare(models / "checkpoint", _changed(models / "export", tmp_path / "x", part))
    assert found["image + text"].maximum > 1e-3
    assert (found["text"].maximum > 1e-3) == moves_text
    if not moves_text:
        assert found["text"].maximum < 1e-5


def test_inputs_suit_both_models(models: Path) -> None:
    a, b = open_weights(models / "checkpoint"), open_weights(models / "export")
    (text, image), _ = make_inputs(a, b)
    again, _ = make_inputs(b, a)
    assert torch.equal(text.tokens, again[0].tokens) and torch.equal(image.images, again[1].images)
    assert b.image_token_id == 4 and not (text.tokens == 4).any()
    assert image.is_image.sum() == 4 and image.images.shape == (1, 3, 8, 8)
    few = replace(b, language=b.language.model_copy(update={"max_position_embeddings": 5}))
    (text, image), _ = make_inputs(a, few)
    assert text.tokens.shape == (2, 5) and image.tokens.shape == (1, 5)
    assert image.is_image.tolist() == [[True] * 4 + [False]]
    none = replace(b, language=b.language.model_copy(update={"max_position_embeddings": 4}))
    _, (sentence,) = make_inputs(a, none)
    assert "an image has 4 tokens but there are 4 positions" in sentence
    other = replace(b, vision=b.vision.model_copy(update={"image_size": 12}))
    _, (sentence,) = make_inputs(a, other)
    assert "(8, 4) pixels per side and tokens in A and (12, 9) in B" in sentence
    small = replace(b, language=b.language.model_copy(update={"vocab_size": 6}))
    (text, _), _ = make_inputs(a, small)
    assert set(text.tokens.flatten().tolist()) == {0, 1, 2, 3, 5}


def test_transformers_cannot_load(models: Path, tmp_path: Path) -> None:
    spoilt = Path(shutil.copytree(models / "export", tmp_path / "spoilt"))
    (spoilt / "modeling_moiie.py").write_text("raise RuntimeError('spoilt code')\n")
    with user_error(spoilt, "spoilt code", "--no-logits"):
        _compare(models / "llm", spoilt)
