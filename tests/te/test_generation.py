"""Generation with Transformer Engine's modules: the answers of the local ones."""

from __future__ import annotations

import pytest
import torch

from moiie_megatron.generation.token_generator import TokenGenerator
from moiie_megatron.mcore.parallel import ParallelContext
from tests.helpers import generation
from tests.helpers.generation import NEW_TOKENS


@pytest.mark.parametrize("language", ["llama", "qwen3", "window", "longrope"])
def test_answers(te: ParallelContext, local: ParallelContext, language: str) -> None:
    config = generation.run_config(language)
    prompts, found = generation.prompts(config), {}
    for name, context in (("te", te), ("local", local)):
        model = generation.model(config, context)
        generator = TokenGenerator(config, context, model, config.language.vocab_size)
        answers = generator.generate(prompts, NEW_TOKENS)
        found[name] = answers, generator.next_token_logits(prompts, answers)
    assert found["te"][0] == found["local"][0]
    torch.testing.assert_close(found["te"][1], found["local"][1], atol=2e-4, rtol=1e-4)
