"""The cache gets to every layer under the name of the installed transformers, or there is an error.

Results with a lost cache look like results: generated tokens, but other ones.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from moiie_megatron.hf.cache_moiie import CACHE, NAMES, check_covers, name_in
from moiie_megatron.hf.modeling_moiie import MoiieForConditionalGeneration
from moiie_megatron.hf.processing_moiie import MoiieProcessor
from tests.unit.hf import tiny

LOST = "handles the cache in another way.* use transformers .*, or use_cache=False"
PROMPTS = {"one row": ["<s>what is <image>?"], "padded": ["<s>what is <image>?", "<s>no picture"]}


@pytest.fixture
def model() -> MoiieForConditionalGeneration:
    return tiny.model(tiny.config())


def _inputs(processor: MoiieProcessor, prompts: list[str]) -> dict[str, Tensor]:
    images = [tiny.picture(0)]
    return dict(processor(text=prompts, images=images, padding=True, return_tensors="pt"))


def _ids(model: Any, inputs: dict[str, Any], steps: int = 4) -> Tensor:
    settings = {"max_new_tokens": steps, "do_sample": False, "eos_token_id": None}
    return model.generate(**inputs, **settings)[:, -steps:]


@pytest.mark.parametrize("name", NAMES)
def test_both_names_of_the_cache(model: Any, name: str) -> None:
    ids = torch.arange(70, 82).view(1, -1)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits[:, 8:]
        first = model(ids[:, :8], **{name: DynamicCache()})
        cache = getattr(first, CACHE)
        got = model(ids[:, 8:], **{name: cache}).logits
    assert cache.get_seq_length() == 12
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_two_caches_are_refused(model: Any) -> None:
    ids, caches = torch.tensor([[70, 71]]), {name: DynamicCache() for name in NAMES}
    with pytest.raises(ValueError, match=f"two caches.* pass one, as {CACHE}"):
        model(ids, **caches)
    with pytest.raises(ValueError, match=f"two caches.* pass one, as {CACHE}"):
        model.prepare_inputs_for_generation(ids, **caches)


def test_a_cache_under_another_name_is_refused(model: Any) -> None:
    with pytest.raises(RuntimeError, match=f"A cache was passed as kv.*{LOST}"):
        model(torch.tensor([[70, 71]]), kv=DynamicCache())


def test_generate_goes_on_from_a_cache(model: Any, processor: MoiieProcessor) -> None:
    inputs = _inputs(processor, PROMPTS["one row"])
    cache = DynamicCache()
    with torch.no_grad():
        model(**inputs, **{CACHE: cache})
    cache.crop(-1)
    ids = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    assert torch.equal(_ids(model, ids | {CACHE: cache}), _ids(model, inputs))


def test_generate_batch_equals_whole_forward_passes(model: Any) -> None:
    """Its paged cache is called ``cache`` in every version."""
    prompts = [[256, 70, 80, 90, 100], [256, 75, 85]]
    settings = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1)
    output = model.generate_batch(prompts, generation_config=settings, progress_bar=False)
    for prompt, result in zip(prompts, output.values(), strict=True):
        ids = torch.tensor([prompt])
        inputs = {"input_ids": ids, "mm_token_type_ids": torch.zeros_like(ids)}
        assert result.generated_tokens == tiny.greedy(model, inputs, 5)[0].tolist()


@pytest.mark.parametrize("prompts", PROMPTS)
def test_a_loop_that_loses_the_cache_is_an_error(
    model: Any, processor: MoiieProcessor, prompts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one row ``generate`` drops the mask, which could show that positions are missing."""
    inputs = _inputs(processor, PROMPTS[prompts])
    update = model._update_model_kwargs_for_generation

    def forgetful(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return update(*args, **kwargs) | {CACHE: None}

    monkeypatch.setattr(model, "_update_model_kwargs_for_generation", forgetful)
    with pytest.raises(RuntimeError, match=f"1 were passed and 0 are in the cache.*{LOST}"):
        _ids(model, inputs)
    assert _ids(model, inputs | {"use_cache": False}).shape == (len(PROMPTS[prompts]), 4)


def test_a_step_without_its_cache_is_an_error(model: Any) -> None:
    with pytest.raises(RuntimeError, match=f"Of 6 positions 1 were passed and 0 are.*{LOST}"):
        model(torch.tensor([[70]]), attention_mask=torch.ones(1, 6, dtype=torch.long))


def test_layers_that_do_not_write_to_the_cache_are_an_error(
    model: Any, processor: MoiieProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = LlamaAttention.forward

    def deaf(self: Any, *args: Any, **kwargs: Any) -> Any:
        return attend(self, *args, **(kwargs | {CACHE: None}))

    monkeypatch.setattr(LlamaAttention, "forward", deaf)
    with pytest.raises(RuntimeError, match=f"1 were passed and 0 are in the cache.*{LOST}"):
        _ids(model, _inputs(processor, PROMPTS["one row"]))


def test_an_attention_that_would_ignore_the_cache_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forward(self: Any, hidden_states: Tensor, kv: Any = None, **kwargs: Any) -> None: ...

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    with pytest.raises(RuntimeError, match=f"has no argument cache or past_key_values: .*{LOST}"):
        tiny.model(tiny.config())


def test_names_and_lengths() -> None:
    assert name_in(lambda *, cache: cache) == "cache"
    assert name_in(lambda past_key_values: past_key_values) == "past_key_values"
    check_covers(None, 5, 5)
    check_covers(None, 5, 3)
    with pytest.raises(RuntimeError, match="Of 6 positions 5 were passed and 0 are"):
        check_covers(None, 5, 6)
