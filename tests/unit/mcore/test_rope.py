"""Scaled rotary embeddings: frequencies by their formulas, and where the long ones begin."""

from __future__ import annotations

import math

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from moiie_megatron.config.schema import LanguageConfig
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.mcore.rope import inverse_frequencies, scaled_rotary_embedding
from tests.parity import tiny

SIZE, BASE = 16, 10000.0
PLAIN = BASE ** (-torch.arange(0, SIZE, 2) / SIZE)  # radians per position
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "short_factor": [1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 8.0, 8.0],
    "long_factor": [2.0, 2.0, 4.0, 4.0, 8.0, 8.0, 16.0, 16.0],
    "original_max_position_embeddings": 32,
    "factor": 4.0,
}


def language(**changes: object) -> LanguageConfig:
    return tiny.language("phi3", rotary_base=BASE, **changes)


def megatron() -> TransformerConfig:
    return TransformerConfig(
        num_layers=1, hidden_size=64, num_attention_heads=4, use_cpu_initialization=True
    )


def test_plain_rope_is_megatrons_own(context: ParallelContext) -> None:
    assert scaled_rotary_embedding(language(), megatron(), context.groups) is None


def test_llama3_frequencies() -> None:
    """Short wave lengths stay, long ones are divided by the factor, between them it is blended."""
    found = inverse_frequencies(language(rope_scaling=LLAMA3), 1)
    for frequency, plain in zip(found.tolist(), PLAIN.tolist(), strict=True):
        turns = 64 * plain / (2 * math.pi)  # within the original context
        blend = min(max((turns - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        wanted = (1 - blend) * plain / 8.0 + blend * plain
        assert frequency == pytest.approx(wanted, rel=1e-5)


def test_longrope_frequencies() -> None:
    config = language(longrope=LONGROPE)
    short, long = inverse_frequencies(config, 32), inverse_frequencies(config, 33)
    assert torch.allclose(short, PLAIN / torch.tensor(LONGROPE["short_factor"]))
    assert torch.allclose(long, PLAIN / torch.tensor(LONGROPE["long_factor"]))


def test_the_length_of_the_sequence_switches_longrope(context: ParallelContext) -> None:
    config = language(longrope=LONGROPE)
    rope = scaled_rotary_embedding(config, megatron(), context.groups)
    assert rope is not None and rope.switch == 32
    for length, name in ((32, "short_factor"), (33, "long_factor")):
        angles = rope.get_freqs_non_repeated(length)
        frequencies = PLAIN / torch.tensor(LONGROPE[name])
        wanted = torch.outer(torch.arange(length).float(), frequencies)
        assert torch.allclose(angles, wanted, rtol=1e-5)
    shifted = rope.get_freqs_non_repeated(33, offset=5)
    assert torch.allclose(shifted[0], 5 * PLAIN / torch.tensor(LONGROPE["long_factor"]))
