"""One expert of every layer as a dense model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moiie_megatron.convert.export import export_checkpoint
from moiie_megatron.convert.extract import extract_expert
from moiie_megatron.convert.upcycle import UpcycleOptions, upcycle_checkpoint
from moiie_megatron.hf.modeling_moiie import MoiieForConditionalGeneration
from tests.helpers.tiny_hf import write_language, write_vision
from tests.helpers.user_errors import user_error

NAMES = ["vision.0", "shared.0", "shared.1", "text.0"]


def _made(folder: Path, family: str, **options: object) -> Path:
    """A checkpoint with experts that all differ."""
    llm = write_language(folder / "llm", family, torch.float32)
    vision = write_vision(folder / "vision", dtype=torch.float32)
    return upcycle_checkpoint(llm, vision, folder / "moe", UpcycleOptions(perturb=0.5, **options))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _made(tmp_path_factory.mktemp("checkpoint"), "llama")


def _load(directory: Path) -> MoiieForConditionalGeneration:
    return MoiieForConditionalGeneration.from_pretrained(directory).eval()


@pytest.mark.parametrize("family", ["llama", "phi3"])
@torch.no_grad()
def test_equals_a_model_with_this_expert_alone(family: str, tmp_path: Path) -> None:
    """With copies of one expert in all places, what the routers choose does not matter."""
    checkpoint = _made(tmp_path, family)
    export_checkpoint(checkpoint, tmp_path / "moe_hf")
    tokens = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(1))
    types = torch.zeros_like(tokens)
    types[:, 3:7] = 1
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": tokens, "mm_token_type_ids": types, "pixel_values": images}
    logits = []
    for expert, name in enumerate(NAMES):
        model = _load(tmp_path / "moe_hf")
        for layer in (1, 3):
            experts = model.model.language_model.layers[layer].mlp.experts
            for weight in (experts.gate_up_proj, experts.down_proj):
                weight.copy_(weight[expert].expand_as(weight).clone())
        dense = _load(extract_expert(checkpoint, [name], tmp_path / name))
        assert dense.config.moe_layers == [] and dense.config.num_experts == 0
        logits.append(dense(**inputs).logits)
        torch.testing.assert_close(logits[-1], model(**inputs).logits, rtol=1e-4, atol=1e-5)
        ids = dense.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)
        assert ids.shape == (2, 15)
    assert all((logits[0] - other).abs().max() > 1e-3 for other in logits[1:])


def test_one_for_each_layer_and_the_rest_as_it_is(checkpoint: Path, tmp_path: Path) -> None:
    export_checkpoint(checkpoint, tmp_path / "moe_hf")
    extract_expert(checkpoint, ["text.0", "shared.1"], tmp_path / "out")
    moe = load_file(tmp_path / "moe_hf" / "model.safetensors")
    dense = load_file(tmp_path / "out" / "model.safetensors")
    ids = {1: 3, 3: 2}
    for name in dense:
        layer = next((n for n in ids if f"layers.{n}.mlp." in name and "language" in name), None)
        origin = name
        if layer is not None:
            origin = name.replace(".mlp.", f".mlp.experts.{ids[layer]}.")
        assert torch.equal(dense[name], moe[origin]), name
    left = {name for name in moe if name not in dense}
    assert left and all(".experts." in name or ".gate" in name for name in left)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["moe_layers"] == [] and config["last_image_token_as_text"] is False


def test_vanilla_experts_are_all_shared(tmp_path: Path) -> None:
    checkpoint = _made(tmp_path, "llama", variant="vanilla", layers="all")
    dense = load_file(extract_expert(checkpoint, ["shared.3"], tmp_path / "out") / MODEL)
    moe = load_file(export_checkpoint(checkpoint, tmp_path / "moe_hf") / MODEL)
    name = "model.language_model.layers.0.mlp.{}down_proj.weight"
    assert torch.equal(dense[name.format("")], moe[name.format("experts.3.")])


MODEL = "model.safetensors"
PROBLEMS = [
    (["vision.1"], ("vision.1", "vision.0, shared.0, shared.1 or text.0")),
    (["3"], ("3", "vision.0, shared.0")),
    (["text.0"] * 3, ("3 experts", "2 MoE layers")),
]


@pytest.mark.parametrize(("experts", "parts"), PROBLEMS)
def test_experts_that_are_not_there(
    experts: list[str], parts: tuple[str, ...], checkpoint: Path, tmp_path: Path
) -> None:
    with user_error(checkpoint, *parts):
        extract_expert(checkpoint, experts, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_extract_or_no_place_for_it(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("mine")
    with user_error(tmp_path / "out", "exists", "another directory"):
        extract_expert(checkpoint, ["text.0"], tmp_path / "out")
    with user_error(tmp_path / "out", "config.json", "--force"):
        extract_expert(checkpoint, ["text.0"], tmp_path / "out", force=True)
    dense = _made(tmp_path / "made", "llama", variant="dense")
    with user_error(dense, "dense", "no experts"):
        extract_expert(dense, ["text.0"], tmp_path / "dense")
