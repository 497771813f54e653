"""The pieces around the experts against transformers' own models and the training side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moiie_megatron.hf.configuration_moiie import MoiieConfig
from moiie_megatron.hf.modeling_moiie import MoiieForConditionalGeneration
from moiie_megatron.vlm.connector import Connector
from moiie_megatron.vlm.vision import VisionEncoder
from tests.parity import tiny as parity
from tests.unit.hf import tiny

TEXTS = {
    "llama": {},
    "llama-llama3": tiny.LLAMA3_ROPE,
    "llama-tied": {"tie_word_embeddings": True},
    "phi3": {},
    "phi3-longrope": tiny.LONGROPE,
    "phi3-window": {"sliding_window": 5},
    "mistral-window": {"sliding_window": 5, "head_dim": 24},
    "qwen2": {},
    "qwen2-window": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    "qwen3": {"head_dim": 24},
}


@pytest.mark.parametrize("length", [20, 40])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TEXTS)
@torch.no_grad()
def test_dense_text_model_equals_transformers(name: str, attention: str, length: int) -> None:
    family = name.split("-")[0]
    config = tiny.config(family, text_config=TEXTS[name], moe_layers=[])
    ours = tiny.model(config)
    ours.set_attn_implementation(attention)
    text_config = type(config.text_config).from_dict(config.text_config.to_dict())
    theirs: Any = AutoModelForCausalLM.from_config(text_config, attn_implementation=attention)
    theirs.eval()
    weights = {
        n.replace("model.language_model.", "model."): t
        for n, t in ours.state_dict().items()
        if n.startswith(("model.language_model.", "lm_head."))
    }
    theirs.load_state_dict(weights)
    ids = torch.randint(0, 256, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, : length // 4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    got, want = ours(**inputs, labels=ids), theirs(**inputs, labels=ids)
    real = mask.bool()
    torch.testing.assert_close(got.logits[real], want.logits[real], rtol=0, atol=1e-5)
    torch.testing.assert_close(got.loss, want.loss)


@pytest.mark.parametrize("family", ["siglip", "clip"])
@torch.no_grad()
def test_image_features_equal_training(family: str) -> None:
    vision = parity.vision(family, ffn_hidden_size=48)
    encoder, connector = VisionEncoder(vision).eval(), Connector(32, 40, 64)
    model = tiny.model(tiny.config(vision_family=family))
    for name, parameter in encoder.named_parameters():
        parameter.copy_(model.model.vision_tower.get_parameter(name.removeprefix("model.")))
    connector.load_state_dict(model.model.multi_modal_projector.state_dict())
    pixels = torch.randn(2, 3, 28, 28)
    features = model.get_image_features(pixels).pooler_output
    assert torch.equal(torch.stack(features), connector(encoder(pixels)))


def _batch() -> dict[str, Tensor]:
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(2))
    ids[0, 2:18] = 258
    types = (ids == 258).long()
    return {"input_ids": ids, "mm_token_type_ids": types, "pixel_values": torch.randn(1, 3, 28, 28)}


def test_router_scores_are_recorded() -> None:
    model, batch = tiny.model(tiny.config()), _batch()
    output = model(**batch, output_router_logits=True, output_hidden_states=True)
    assert len(output.router_logits) == 2 and len(output.hidden_states) == 5
    is_image = batch["mm_token_type_ids"].flatten().bool()
    for scores in output.router_logits:
        forbidden = torch.isneginf(scores).nonzero().tolist()
        assert forbidden == [[t, 3 if image else 0] for t, image in enumerate(is_image.tolist())]
    assert model(**batch).router_logits is None
    model.config.output_router_logits = True
    assert len(model(**batch).router_logits) == 2


def test_attentions_are_recorded() -> None:
    model, batch = tiny.model(tiny.config("qwen3", text_config={"head_dim": 24})), _batch()
    model.set_attn_implementation("eager")
    attentions = model(**batch, output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in attentions] == [(2, 4, 24, 24)] * 4
    # Layers of every kind stay on one device.
    assert model._no_split_modules >= {"MoiieDecoderLayer", "SiglipEncoderLayer"}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_reaches_every_part(checkpointing: bool) -> None:
    model, batch = tiny.model(tiny.config("phi3", "clip")).train(), _batch()
    if checkpointing:
        # Its name before 5.23, which later versions have as well.
        model.gradient_checkpointing_enable()
    labels = batch["input_ids"].masked_fill(batch["mm_token_type_ids"] == 1, -100)
    model(**batch, labels=labels).loss.backward()
    without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    unused = ("encoder.layers.2.", "vision_tower.post_layernorm.")  # behind the features
    assert without and all(any(u in name for u in unused) for name in without)


def test_experts_are_computed_alike() -> None:
    model, batch = tiny.model(tiny.config()), _batch()
    with torch.no_grad():
        want = model(**batch).logits
        for kind in ("eager", "batched_mm"):
            model.set_experts_implementation(kind)
            assert model.config.text_config._experts_implementation == kind
            torch.testing.assert_close(model(**batch).logits, want, rtol=0, atol=1e-4)


def test_router_dtype() -> None:
    """``model`` rounds the scores of a bf16 model, ``float32`` computes them in fp32."""
    batch = _batch()
    scores = {}
    for dtype in ("float32", "model"):
        model = tiny.model(tiny.config(router_dtype=dtype)).to(torch.bfloat16)
        output = model(**batch, output_router_logits=True)
        assert output.logits.dtype == torch.bfloat16
        scores[dtype] = output.router_logits[0]
    assert scores["float32"].dtype == torch.float32 and scores["model"].dtype == torch.bfloat16
    assert not torch.equal(scores["float32"], scores["model"].float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_layers": [1, 4]}, r"moe_layers is \[1, 4\]: use numbers from 0 to 3"),
        ({"num_experts_per_tok": 4}, "num_experts_per_tok is 4, .* a router has 3 to choose"),
        ({"router_dtype": "bf16"}, "router_dtype is bf16: use float32 or model"),
        ({"top_k": 2}, "top_k is 2: write it as num_experts_per_tok"),
        ({"text_config": {"model_type": "gpt2"}}, "model_type is gpt2, which has no hidden_act"),
    ],
)
def test_a_wrong_config_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.config(**changes)


def test_a_decoder_of_another_structure_is_refused() -> None:
    """OLMo 2 has the same kinds of modules, but norms behind attention and FFN."""
    with pytest.raises(ValueError, match="model_type is olmo2, whose layers are not a norm,"):
        tiny.model(tiny.config(text_config={"model_type": "olmo2"}))


def test_config_defaults() -> None:
    text = tiny.text("llama", tie_word_embeddings=True)
    config = MoiieConfig(text_config=text, vision_config=tiny.vision("siglip"))
    assert config.tie_word_embeddings and config.connector_hidden_size == 64
    assert config.num_image_tokens == (28 // 7) ** 2
    assert config.get_text_config() is config.text_config
    model = MoiieForConditionalGeneration(tiny.config(text_config={"tie_word_embeddings": True}))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.generation_config.eos_token_id == 257
