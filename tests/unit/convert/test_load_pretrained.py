"""What load_pretrained accepts and refuses, on a real model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moiie_megatron.config.schema import MoEConfig, RunConfig, VisionConfig
from moiie_megatron.convert.fill_model import fill_model
from moiie_megatron.convert.load_pretrained import load_pretrained
from moiie_megatron.families.weight_map import CONNECTOR, connector_rows, vision_rows
from moiie_megatron.mcore.parallel import ParallelContext
from tests.helpers.user_errors import user_error
from tests.parity import golden, tiny


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return golden.dense_directory("llama", tmp_path / "dense")


def _edit(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors")


def _config(
    directory: Path, moe: MoEConfig | None = None, vision: VisionConfig | None = None
) -> RunConfig:
    return tiny.run_config(tiny.language("llama", pretrained=str(directory)), moe, vision)


def _refused(config: RunConfig, context: ParallelContext, *parts: object) -> None:
    model = tiny.build(config, context)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with user_error(*parts):
        load_pretrained(model, config)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_missing_tensor(dense: Path, context: ParallelContext) -> None:
    name = "model.layers.2.self_attn.k_proj.weight"
    _edit(dense, lambda weights: weights.pop(name))
    _refused(_config(dense), context, name, "missing", dense)


def test_tensors_without_a_place(dense: Path, context: ParallelContext) -> None:
    extra = {f"model.layers.{i}.self_attn.q_proj.bias": torch.zeros(64) for i in range(4)}
    _edit(dense, lambda weights: weights.update(extra))
    _refused(_config(dense), context, dense, "layers.0.self_attn.q_proj.bias", "1 more")


def test_a_tensor_of_another_shape(dense: Path, context: ParallelContext) -> None:
    weights = load_file(dense / "model.safetensors")
    weights["lm_head.weight"] = torch.zeros(260, 64)
    save_file(weights, dense / "model.safetensors")
    config = _config(dense)
    with user_error("output_layer.weight", "(260, 64)", "(256, 64)"):
        load_pretrained(tiny.build(config, context), config)


def test_another_architecture(dense: Path, context: ParallelContext) -> None:
    values = json.loads((dense / "config.json").read_text()) | {"rope_theta": 1e4}
    (dense / "config.json").write_text(json.dumps(values))
    _refused(_config(dense), context, "language.rotary_base", "500000.0", "rope_theta", "10000.0")


def test_experts_cannot_become_dense(context: ParallelContext) -> None:
    """A MoE checkpoint in a dense stage: its experts have no place."""
    _refused(_config(golden.ROOT / "tiny_llama_moiie"), context, r"mlp.experts.0.down_proj.weight")


def test_experts_of_another_number(context: ParallelContext) -> None:
    moe = MoEConfig(num_vision_experts=2, num_shared_experts=4, num_text_experts=2)
    _refused(_config(golden.ROOT / "tiny_llama_moiie", moe), context, "mlp.experts.4", "missing")


def test_rotary_buffers_and_a_vision_tower_are_ignored(
    dense: Path, context: ParallelContext
) -> None:
    """As in composed checkpoints; their connector is read where they hold one."""
    model = tiny.build(_config(dense), context)
    shapes = {n: p.shape for n, p in model.named_parameters() if n.startswith(CONNECTOR)}
    projector = {row.hf[0]: torch.randn(shapes[row.megatron]) for row in connector_rows()}
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
        "model.vision_tower.vision_tower.vision_model.head.probe": torch.zeros(1),
    }
    _edit(dense, lambda weights: weights.update(projector | extra))
    left = load_pretrained(model, _config(dense))
    assert left and all(name.startswith("vision_encoder.") for name in left)
    parameters = dict(model.named_parameters())
    for row in connector_rows():
        assert torch.equal(parameters[row.megatron], projector[row.hf[0]])


@pytest.mark.parametrize("is_equal", [True, False])
def test_a_tied_matrix_stored_twice(is_equal: bool, dense: Path, context: ParallelContext) -> None:
    """Another one is no tied matrix: transformers does not tie it, and the run has to say so."""
    values = json.loads((dense / "config.json").read_text()) | {"tie_word_embeddings": True}
    (dense / "config.json").write_text(json.dumps(values))
    language = tiny.language("llama", pretrained=str(dense), tied_embeddings=True)
    config = tiny.run_config(language)
    model = tiny.build(config, context)
    embedding = load_file(dense / "model.safetensors")["model.embed_tokens.weight"]
    if is_equal:
        _edit(dense, lambda weights: weights.update({"lm_head.weight": embedding.clone()}))
        load_pretrained(model, config)
        assert torch.equal(model.shared_embedding_or_output_weight(), embedding)
        return
    with user_error(dense, "lm_head.weight", "language.tied_embeddings=false"):
        load_pretrained(model, config)
    config = tiny.run_config(language.model_copy(update={"tied_embeddings": False}))
    model = tiny.build(config, context)
    load_pretrained(model, config)
    output = dict(model.named_parameters())["language_model.output_layer.weight"]
    assert torch.equal(output, load_file(dense / "model.safetensors")["lm_head.weight"])


PREFIXES = ["", "vision_model.", "model.vision_tower.vision_tower.vision_model."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("family", ["siglip", "clip"])
def test_a_vision_tower_under_any_prefix(
    family: str, prefix: str, context: ParallelContext, tmp_path: Path
) -> None:
    vision = tiny.vision(family, pretrained=str(tmp_path))
    config = tiny.run_config(tiny.language("llama", num_layers=2), vision_config=vision)
    model = tiny.build(config, context)
    parameters = dict(model.named_parameters())
    rows = vision_rows(vision, prefix)
    weights = {row.hf[0]: torch.randn_like(parameters[row.megatron]) for row in rows}
    others = {f"{prefix}embeddings.position_ids": torch.arange(4)}
    if prefix:
        others |= {
            "text_model.final_layer_norm.weight": torch.ones(3),
            "logit_scale": torch.ones(1),
        }
    _write_vision(tmp_path, vision, weights | others)
    load_pretrained(model, config)
    assert all(torch.equal(parameters[row.megatron], weights[row.hf[0]]) for row in rows)


def test_vision_tensors_without_a_place_and_missing_ones(
    context: ParallelContext, tmp_path: Path
) -> None:
    vision = tiny.vision("siglip", pretrained=str(tmp_path))
    config = tiny.run_config(tiny.language("llama", num_layers=2), vision_config=vision)
    parameters = dict(tiny.build(config, context).named_parameters())
    weights = {r.hf[0]: parameters[r.megatron].detach().clone() for r in vision_rows(vision)}
    _write_vision(tmp_path, vision, weights | {"vision_model.extra.weight": torch.ones(1)})
    _refused(config, context, "extra.weight")
    weights.pop("vision_model.post_layernorm.bias")
    _write_vision(tmp_path, vision, weights)
    _refused(config, context, "vision_model.post_layernorm.bias", "missing")
    _write_vision(tmp_path, vision, {"text_model.x": torch.ones(1)})
    _refused(config, context, tmp_path, "0 vision towers")


def _write_vision(folder: Path, vision: VisionConfig, weights: dict[str, Tensor]) -> None:
    values = {
        "model_type": f"{vision.family}_vision_model",
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_attention_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
    }
    (folder / "config.json").write_text(json.dumps(values))
    save_file(weights, folder / "model.safetensors")


def test_assign_asks_for_every_tensor_once_and_leaves_what_is_not_given(
    context: ParallelContext,
) -> None:
    config = tiny.run_config(tiny.language("llama"), MoEConfig())
    model = tiny.build(config, context)
    before = {name: p.clone() for name, p in model.named_parameters()}
    asked: list[tuple[str, int | None]] = []

    def get(name: str, expert: int | None) -> Tensor | None:
        asked.append((name, expert))
        # One expert of one layer: 2 f = 256 rows [gate | up], numbered.
        if (name, expert) == (fc1, 2):
            return torch.arange(256.0).unsqueeze(1).expand(256, 64)
        return None

    fc1 = "language_model.decoder.layers.3.mlp.experts.experts.linear_fc1.weight"
    left = fill_model(model, get)
    assert len(set(asked)) == len(asked) and (fc1, 3) in asked
    assert set(left) == {name for name, _ in asked}
    changed = model.language_model.decoder.layers[3].mlp.experts.weight_fc1
    assert torch.equal(changed[2, :, 5], torch.arange(256.0))
    for name, parameter in model.named_parameters():
        if parameter is changed:
            assert torch.equal(parameter[[0, 1, 3]], before[name][[0, 1, 3]])
        else:
            assert torch.equal(parameter, before[name]), name
