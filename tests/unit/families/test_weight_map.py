"""The name tables against what transformers itself calls its tensors, on the meta device."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from moiie_megatron.config.families import LANGUAGE_FAMILIES, VISION_FAMILIES
from moiie_megatron.config.schema import LanguageConfig, VisionConfig
from moiie_megatron.families.hf_config import language_to_hf, vision_to_hf
from moiie_megatron.families.registry import language_family
from moiie_megatron.families.weight_map import connector_rows, language_rows, vision_rows
from moiie_megatron.layout.experts import ExpertLayout

FAMILIES = [name for name in LANGUAGE_FAMILIES if not language_family(name).has_experts]
IDS = {"pad_token_id": 0}  # inside the vocabulary
DENSE = ExpertLayout.from_variant("dense")
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def _language(family: str, tied: bool = False) -> LanguageConfig:
    return LanguageConfig(
        family=family,
        num_layers=3,
        hidden_size=16,
        ffn_hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=40,
        max_position_embeddings=64,
        tied_embeddings=tied,
        head_dim=6,  # not 16 / 4
        **language_family(family).fixed,
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_tables_name_every_tensor_of_transformers(family: str, tied: bool) -> None:
    language = _language(family, tied)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(language_to_hf(language, IDS)).state_dict()
    if tied:
        state.pop("lm_head.weight")  # the embedding matrix under a second name
    rows = language_rows(language, DENSE, [])
    names = [name for row in rows for name in row.hf]
    assert sorted(names) == sorted(state)
    assert len({row.megatron for row in rows}) == len(rows)
    for row in rows:
        made = row.transform.to_megatron([state[name] for name in row.hf])
        assert tuple(made.shape) == row.shape, row.megatron


def test_transforms_give_the_shapes_of_megatron() -> None:
    """Rows read both ways: the shapes of transformers, through Megatron's, and back."""
    config = LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=40)
    state = LlamaForCausalLM(config).state_dict()
    rows = {row.megatron: row for row in language_rows(_language("llama"), DENSE, [])}
    for row in rows.values():
        parts = [state[name] for name in row.hf]
        back = row.transform.to_hf(row.transform.to_megatron(parts))
        assert all(torch.equal(*pair) for pair in zip(back, parts, strict=True)), row
    qkv = rows["language_model.decoder.layers.0.self_attention.linear_qkv.weight"]
    assert qkv.transform.to_megatron([state[name] for name in qkv.hf]).shape == (32, 16)
    fc1 = rows["language_model.decoder.layers.0.mlp.linear_fc1.weight"]
    assert fc1.transform.to_megatron([state[name] for name in fc1.hf]).shape == (64, 16)


def test_moe_layers_use_the_names_of_the_reference() -> None:
    layout = ExpertLayout.from_variant("moiie")
    rows = language_rows(_language("phi3"), layout, [1])
    by_name = {(row.megatron, row.expert): row.hf for row in rows}
    layer, hf_layer = "language_model.decoder.layers.1.", "model.layers.1."
    fc1 = layer + "mlp.experts.experts.linear_fc1.weight"
    assert by_name[fc1, 3] == (hf_layer + "mlp.experts.3.gate_up_proj.weight",)
    gates = layer + "mlp.router.gates."
    assert by_name[gates + "text", None] == (hf_layer + "mlp.gate.weight",)
    assert by_name[gates + "vision", None] == (hf_layer + "mlp.gate_vis.weight",)
    norm = hf_layer + "post_attention_layernorm.weight"
    assert by_name[layer + "pre_mlp_layernorm.weight", None] == (norm,)
    assert {expert for name, expert in by_name if name == fc1} == {0, 1, 2, 3}
    assert not any("layers.1.mlp.linear" in name for name, _ in by_name)
    assert any("layers.2.mlp.linear_fc1.weight" in name for name, _ in by_name)


def test_vanilla_has_one_router() -> None:
    rows = language_rows(_language("llama"), ExpertLayout.from_variant("vanilla"), [0, 1, 2])
    gates = {row.megatron: row.hf for row in rows if ".router." in row.megatron}
    start = "language_model.decoder.layers.2.mlp.router.gates."
    assert len(gates) == 3
    assert gates[start + "joint"] == ("model.layers.2.mlp.gate.weight",)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_vision_tables_name_every_tensor_of_transformers(family: str) -> None:
    vision = VisionConfig(
        family=family,
        hidden_size=16,
        ffn_hidden_size=32,
        num_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
        activation="gelu",
    )
    with torch.device("meta"):
        model = AutoModel.from_config(vision_to_hf(vision))
    rows = vision_rows(vision, prefix="x.")
    state = {f"x.{name}": tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {row.hf[0]: row.shape for row in rows} == state
    assert all(row.megatron == "vision_encoder.model." + row.hf[0][2:] for row in rows)


def test_connector_names() -> None:
    names = {row.megatron: row.hf[0] for row in connector_rows()}
    assert names == {
        "connector.linear_1.weight": "model.mm_projector.0.weight",
        "connector.linear_1.bias": "model.mm_projector.0.bias",
        "connector.linear_2.weight": "model.mm_projector.2.weight",
        "connector.linear_2.bias": "model.mm_projector.2.bias",
    }
