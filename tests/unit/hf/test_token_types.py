"""Token types that do not belong to the positions of a step are cut, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from moiie_megatron.hf.cache_moiie import CACHE
from moiie_megatron.hf.language_moiie import MoiieSparseMLP
from moiie_megatron.hf.modeling_moiie import MoiieForConditionalGeneration
from moiie_megatron.hf.processing_moiie import MoiieProcessor
from tests.unit.hf import tiny

PROMPT = "<s>what is <image> and what"
SHAPE = "mm_token_type_ids has shape .* for positions of shape .* pass one type per position"


@pytest.fixture(scope="module")
def model() -> MoiieForConditionalGeneration:
    return tiny.model(tiny.config())


@pytest.fixture(scope="module")
def inputs(processor: MoiieProcessor) -> dict[str, Tensor]:
    return dict(processor(text=PROMPT, images=[tiny.picture(0)], return_tensors="pt"))


def _decoded(model: Any, inputs: dict[str, Tensor], types: Tensor | None, count: int) -> Tensor:
    """Logits of ``count`` tokens behind the prompt, with the prompt's cache."""
    cache = DynamicCache()
    ids = torch.arange(70, 70 + count).view(1, -1)
    with torch.no_grad():
        model(**inputs, **{CACHE: cache})
        return model(ids, mm_token_type_ids=types, **{CACHE: cache}).logits


@pytest.mark.parametrize("count", [1, 3])
def test_types_of_the_whole_sequence_serve_its_last_positions(
    model: Any, inputs: dict[str, Tensor], count: int
) -> None:
    """As ``generate`` of transformers before 5.23 passes them."""
    text = torch.zeros(1, count, dtype=torch.long)
    want = _decoded(model, inputs, text, count)
    whole = torch.cat([inputs["mm_token_type_ids"], text], dim=1)
    assert torch.equal(_decoded(model, inputs, whole, count), want)
    assert torch.equal(_decoded(model, inputs, None, count), want)
    if count == 1:  # more are refused: there is no picture
        assert not torch.equal(_decoded(model, inputs, text + 1, count), want)


@pytest.mark.parametrize(
    "shape", [(1, 2), (2, 3), (3,), (1, 3, 1), (1, 99)], ids=["short", "rows", "1d", "3d", "behind"]
)
def test_types_of_another_shape_are_refused(
    model: Any, inputs: dict[str, Tensor], shape: tuple[int, ...]
) -> None:
    """Also types of positions behind the step: those of a prompt whose chunk it is."""
    with pytest.raises(ValueError, match=SHAPE):
        _decoded(model, inputs, torch.zeros(shape, dtype=torch.long), 3)


def test_the_experts_take_one_type_for_every_token(model: Any) -> None:
    layer = next(m for m in model.modules() if isinstance(m, MoiieSparseMLP))
    for shape in ((1, 1), (2, 1), (1, 4)):
        with pytest.raises(ValueError, match=r"is_image has shape .* for 3 tokens: pass one value"):
            layer(torch.zeros(1, 3, 64), torch.zeros(shape, dtype=torch.bool))


def test_image_ids_behind_a_cache_need_types(model: Any, inputs: dict[str, Tensor]) -> None:
    """They would be text, whatever was meant; one decoded token is text."""
    cache = DynamicCache()
    image = torch.tensor([[tiny.config().image_token_id] * 2])
    with torch.no_grad():
        model(**inputs, **{CACHE: cache})
        with pytest.raises(ValueError, match="do not tell an image from a decoded image token"):
            model(image, **{CACHE: cache})
        want = model(image[:, :1], mm_token_type_ids=torch.zeros(1, 1), **{CACHE: cache}).logits
        cache.crop(-1)
        assert torch.equal(model(image[:, :1], **{CACHE: cache}).logits, want)
    with pytest.raises(ValueError, match="hold 1 image positions.* have 0 image tokens"):
        model(image[:, :1])


def test_candidates_are_text(model: Any, processor: MoiieProcessor) -> None:
    """The prompt ends with an image, and its beginning is proposed again and again."""
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    inputs = processor(text="<s>what is <image>", images=[tiny.picture(0)], return_tensors="pt")
    want = model.generate(**inputs, **settings)
    lookup = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}
    assert torch.equal(model.generate(**inputs, **settings, **lookup), want)


def test_a_part_of_a_prompt_gets_its_own_types(model: Any, inputs: dict[str, Tensor]) -> None:
    """``generate`` before 5.23 hands over those of the whole prompt, and no images with them."""
    cache = DynamicCache()
    ids, types = inputs["input_ids"], inputs["mm_token_type_ids"]
    begin = int(types[0].argmax())
    assert begin > 0

    def prepared(ids: Tensor) -> dict[str, Any]:
        return model.prepare_inputs_for_generation(
            ids, mm_token_type_ids=types, use_cache=True, **{CACHE: cache}
        )

    step = prepared(ids[:, :begin])
    assert torch.equal(step["mm_token_type_ids"], types[:, :begin])
    with torch.no_grad():
        model(**step)
    with pytest.raises(ValueError, match="does not pass images with chunks of a prompt"):
        prepared(ids[:, begin : begin + 1])
