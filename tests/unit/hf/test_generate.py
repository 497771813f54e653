"""``generate``: what it writes is what whole forward passes without any cache write."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor

from moiie_megatron.hf.language_moiie import MoiieSparseMLP
from moiie_megatron.hf.modeling_moiie import MoiieForConditionalGeneration
from moiie_megatron.hf.processing_moiie import MoiieProcessor
from tests.unit.hf import tiny

STEPS = 8
PROMPTS = ["<s>what is <image>?", "<s>compare <image> and <image> now", "<s>no picture here"]
IMAGES = [[0], [1, 2], []]
BACKBONES = {
    "llama-siglip": {},
    "phi3-clip": {},
    "llama-siglip-llama3": tiny.LLAMA3_ROPE,
    "phi3-siglip-longrope": tiny.LONGROPE,
    "phi3-clip-window": {"sliding_window": 7},
}


def _model(backbone: str) -> MoiieForConditionalGeneration:
    family, vision, *_ = backbone.split("-")
    return tiny.model(tiny.config(family, vision, text_config=BACKBONES[backbone]))


@pytest.fixture(scope="module", params=BACKBONES)
def model(request: pytest.FixtureRequest) -> MoiieForConditionalGeneration:
    return _model(request.param)


@pytest.fixture(scope="module")
def llama() -> MoiieForConditionalGeneration:
    return _model("llama-siglip")


def _inputs(processor: MoiieProcessor, *rows: int) -> dict[str, Tensor]:
    images = [tiny.picture(i) for row in rows for i in IMAGES[row]]
    prompts = [PROMPTS[row] for row in rows]
    return dict(processor(text=prompts, images=images or None, padding=True, return_tensors="pt"))


def _generate(model: Any, inputs: dict[str, Tensor], **settings: Any) -> Tensor:
    settings = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None} | settings
    return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("row", range(3), ids=["one", "two", "none"])
def test_equals_whole_forward_passes(
    model: MoiieForConditionalGeneration, processor: MoiieProcessor, row: int
) -> None:
    """The longrope model outgrows its original context of 30 on the way, in the prompt, never."""
    inputs = _inputs(processor, row)
    want = tiny.greedy(model, inputs, STEPS)
    assert want.unique().numel() > 2, "the model repeats itself: nothing is tested"
    assert torch.equal(_generate(model, inputs), want)
    assert torch.equal(_generate(model, inputs, use_cache=False), want)


def test_longrope_starts_over_where_it_outgrows_its_context(processor: MoiieProcessor) -> None:
    """With the keys computed for the original context the ids would be others."""
    model = _model("phi3-siglip-longrope")
    inputs = _inputs(processor, 0)
    length = inputs["input_ids"].shape[1]
    original = model.config.text_config.rope_parameters["original_max_position_embeddings"]
    assert length < original < length + STEPS
    right = _generate(model, inputs)
    model._outgrows_cache = lambda *_: False
    wrong = _generate(model, inputs)
    same = original - length + 1
    assert torch.equal(right[:, :same], wrong[:, :same]) and not torch.equal(right, wrong)


@pytest.mark.parametrize("backbone", ["llama-siglip", "phi3-clip", "phi3-clip-window"])
def test_left_padded_batch_equals_single_rows(backbone: str, processor: MoiieProcessor) -> None:
    model = _model(backbone)
    batch = _inputs(processor, 0, 1, 2)
    assert (batch["attention_mask"][:, 0] == 0).sum() == 2 and batch["attention_mask"][:, -1].all()
    want = torch.cat([_generate(model, _inputs(processor, row)) for row in range(3)])
    assert torch.equal(_generate(model, batch), want)
    assert torch.equal(_generate(model, batch, use_cache=False), want)
    assert torch.equal(_generate(model, batch, cache_implementation="static"), want)


def test_padding_changes_no_logits(llama: Any, processor: MoiieProcessor) -> None:
    batch, single = _inputs(processor, 1, 0), _inputs(processor, 0)
    settings = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 3}
    settings |= {"do_sample": False, "eos_token_id": None}
    got = torch.stack(llama.generate(**batch, **settings).logits)[:, 1]
    want = torch.stack(llama.generate(**single, **settings).logits)[:, 0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_beams_keep_images_with_their_prompts(llama: Any, processor: MoiieProcessor) -> None:
    """A prompt with two images is expanded as a whole."""
    settings = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0}
    batch = _generate(llama, _inputs(processor, 1, 0), **settings)
    single = [_generate(llama, _inputs(processor, row), **settings) for row in (1, 0)]
    assert torch.equal(batch, torch.cat(single))
    assert not torch.equal(single[0][0], single[0][1])
    copies = _generate(llama, _inputs(processor, 1), num_return_sequences=2, do_sample=True)
    assert copies.shape == (2, STEPS)


def test_prompt_in_chunks(llama: Any, processor: MoiieProcessor) -> None:
    inputs, text = _inputs(processor, 1), _inputs(processor, 2)
    assert torch.equal(_generate(llama, text, prefill_chunk_size=10), _generate(llama, text))
    if Version(transformers.__version__) < Version("5.23"):
        with pytest.raises(ValueError, match="does not pass images with chunks of a prompt"):
            _generate(llama, inputs, prefill_chunk_size=10)
        return
    assert torch.equal(_generate(llama, inputs, prefill_chunk_size=10), _generate(llama, inputs))


def test_decoded_tokens_are_text(llama: Any, processor: MoiieProcessor) -> None:
    seen: list[Tensor] = []
    layers = [m for m in llama.modules() if isinstance(m, MoiieSparseMLP)]
    hooks = [m.register_forward_pre_hook(lambda _, args: seen.append(args[1])) for m in layers]
    inputs = _inputs(processor, 1)
    _generate(llama, inputs)
    without = {k: v for k, v in inputs.items() if k != "mm_token_type_ids"}
    assert torch.equal(_generate(llama, without), _generate(llama, inputs))
    for hook in hooks:
        hook.remove()
    assert len(layers) == 2 and len(seen) == 3 * 2 * STEPS
    for first in range(0, len(seen), 2 * STEPS):
        prefill, steps = seen[first : first + 2], seen[first + 2 : first + 2 * STEPS]
        assert all(mask.sum() == 2 * tiny.IMAGE_TOKENS for mask in prefill)
        assert all(mask.shape == (1, 1) and not mask.any() for mask in steps)


def test_an_image_token_that_was_decoded_is_text(llama: Any, processor: MoiieProcessor) -> None:
    """Its id is inside the vocabulary here and forced to be chosen."""
    inputs = _inputs(processor, 0)
    image_id = llama.config.image_token_id
    forced = _generate(llama, inputs, sequence_bias=[[[image_id], 1e4]], max_new_tokens=3)
    assert forced.tolist() == [[image_id] * 3]
    bare = {k: v for k, v in inputs.items() if k != "mm_token_type_ids"}
    again = _generate(llama, bare, sequence_bias=[[[image_id], 1e4]], max_new_tokens=3)
    assert torch.equal(forced, again)


def test_images_matter(llama: Any, processor: MoiieProcessor) -> None:
    inputs = _inputs(processor, 1)
    with torch.no_grad():
        logits = llama(**inputs).logits[:, -1]
        inputs["pixel_values"] = inputs["pixel_values"].flip(0)
        swapped = llama(**inputs).logits[:, -1]
    assert (logits - swapped).abs().max() > 1e-2


@pytest.mark.parametrize("extra", [-1, 1])
def test_another_number_of_image_tokens_is_refused(
    llama: Any, processor: MoiieProcessor, extra: int
) -> None:
    inputs = _inputs(processor, 1)
    inputs["pixel_values"] = torch.cat([inputs["pixel_values"]] * 2)[: 2 + extra]
    count = (2 + extra) * tiny.IMAGE_TOKENS
    with pytest.raises(ValueError, match=f"hold 32 image positions.* have {count} image tokens"):
        llama(**inputs)
    del inputs["pixel_values"]
    with pytest.raises(ValueError, match="hold 32 image positions.* have 0 image tokens"):
        llama(**inputs)


def test_embeddings_need_types(llama: Any) -> None:
    with pytest.raises(ValueError, match="pass mm_token_type_ids"):
        llama(inputs_embeds=torch.zeros(1, 4, 64))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        llama()
