"""What is on disk after ``save_pretrained``, and that loading it gives the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moiie_megatron.families.weight_map import vision_rows
from moiie_megatron.hf.auto_files import AUTO_MAP, REMOTE_FILES, write_remote_code
from moiie_megatron.hf.modeling_moiie import MoiieForConditionalGeneration, MoiieModel
from tests.parity import tiny as parity
from tests.unit.hf import tiny

ATTENTION = {
    "llama": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"],
    "phi3": ["self_attn.qkv_proj", "self_attn.o_proj"],
}
FFN = {"llama": ["gate_proj", "up_proj", "down_proj"], "phi3": ["gate_up_proj", "down_proj"]}


def _expected_names(family: str, vision: str, routers: list[str], tied: bool) -> set[str]:
    """The layout that is promised to users, spelled out."""
    language = "model.language_model."
    names = {f"{language}embed_tokens.weight", f"{language}norm.weight"}
    names |= set() if tied else {"lm_head.weight"}
    for layer in range(4):
        start = f"{language}layers.{layer}."
        names |= {
            f"{start}{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")
        }
        names |= {f"{start}{part}.weight" for part in ATTENTION[family]}
        if layer in (1, 3):
            names |= {f"{start}mlp.{router}.weight" for router in routers}
            names |= {
                f"{start}mlp.experts.{i}.{part}_proj.weight"
                for i in range(4)
                for part in ("gate", "up", "down")
            }
        else:
            names |= {f"{start}mlp.{part}.weight" for part in FFN[family]}
    names |= {
        f"model.multi_modal_projector.linear_{i}.{kind}"
        for i in (1, 2)
        for kind in ("weight", "bias")
    }
    rows = vision_rows(parity.vision(vision), prefix="model.vision_tower.")
    return names | {name for row in rows for name in row.hf}


@pytest.mark.parametrize(
    ("family", "vision", "changes"),
    [
        ("llama", "siglip", {}),
        ("llama", "clip", {"tie_word_embeddings": True}),
        ("phi3", "siglip", {"experts": {"shared": 4}}),
        ("phi3", "clip", {"dtype": torch.bfloat16, "router_dtype": "model"}),
    ],
    ids=["llama", "tied", "vanilla", "bf16"],
)
@torch.no_grad()
def test_round_trip(family: str, vision: str, changes: Any, tmp_path: Path) -> None:
    config = tiny.config(family, vision, **changes)
    model = tiny.model(config).to(changes.get("dtype", torch.float32))
    model.save_pretrained(tmp_path)

    stored = load_file(tmp_path / "model.safetensors")
    tied = config.tie_word_embeddings
    assert set(stored) == _expected_names(family, vision, list(config.routers), tied)
    fused = model.state_dict()["model.language_model.layers.3.mlp.experts.gate_up_proj"]
    prefix = "model.language_model.layers.3.mlp.experts.2."
    assert torch.equal(stored[f"{prefix}gate_proj.weight"], fused[2, :96])
    assert torch.equal(stored[f"{prefix}up_proj.weight"], fused[2, 96:])

    loaded, report = MoiieForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == model.dtype
    _assert_same(loaded.state_dict(), model.state_dict())
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    base = MoiieModel.from_pretrained(tmp_path)
    _assert_same(base.state_dict(), model.model.state_dict())

    settings = (
        "experts",
        "moe_layers",
        "router_dtype",
        "num_experts_per_tok",
        "last_image_token_as_text",
    )
    settings += ("image_token_id", "num_image_tokens", "connector_hidden_size")
    assert all(getattr(loaded.config, k) == getattr(config, k) for k in settings)
    kept, text = loaded.config.text_config.to_dict(), config.text_config.to_dict()
    assert kept == text | {"dtype": kept["dtype"]}
    assert loaded.generation_config.top_k is None


def _assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert set(got) == set(want)
    assert [n for n in want if got[n].dtype != want[n].dtype or not got[n].equal(want[n])] == []


def test_a_pooling_head_is_left_aside(tmp_path: Path) -> None:
    """SigLIP's published weights have one; a config that says so asks for no weights."""
    config = tiny.config(vision_config=tiny.vision("siglip") | {"vision_use_head": True})
    assert not [n for n in tiny.model(config).state_dict() if ".head." in n]


def test_write_remote_code(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "moiie", "auto_map": {"x": "y"}}')
    written = write_remote_code(tmp_path)
    assert {p.name for p in written} == {*REMOTE_FILES, "config.json"}
    assert {p.name for p in tmp_path.iterdir()} == {*REMOTE_FILES, "config.json"}
    content = json.loads((tmp_path / "config.json").read_text())
    assert content == {"model_type": "moiie", "auto_map": AUTO_MAP}


def test_write_remote_code_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no directory .*/nowhere"):
        write_remote_code(tmp_path / "nowhere")
    (tmp_path / "processor_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="processor_config.json does not hold a JSON object"):
        write_remote_code(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["processor_config.json"]
