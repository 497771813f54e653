"""Tokens are drawn with the probabilities that the settings mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moiie_megatron.generation.sampling import Sampler, Sampling
from tests.helpers.user_errors import user_error

LOGITS = torch.log(torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2]))  # probabilities at temperature 1
DRAWS = 4000


def frequencies(sampling: Sampling) -> Tensor:
    """How often each token is drawn, by as many prompts with the same scores."""
    sampler = Sampler(sampling, range(DRAWS))
    ids = sampler.choose(LOGITS.expand(DRAWS, -1))
    return ids.bincount(minlength=len(LOGITS)) / DRAWS


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.1, 0.4, 0.05, 0.25, 0.2]),
        ({"top_k": 2}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"top_k": 99}, [0.1, 0.4, 0.05, 0.25, 0.2]),
        ({"top_p": 0.6}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"top_p": 1e-9}, [0, 1.0, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.7}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"temperature": 0.5}, (torch.tensor([1, 16, 0.25, 6.25, 4]) / 27.5).tolist()),
    ],
)
def test_probabilities(settings: dict[str, float], expected: list[float]) -> None:
    """The standard error of a frequency is at most 0.008."""
    found = frequencies(Sampling(**({"temperature": 1.0} | settings)))  # type: ignore[arg-type]
    torch.testing.assert_close(found, torch.tensor(expected), atol=0.03, rtol=0)
    assert (found[torch.tensor(expected) == 0] == 0).all()


def test_greedy_takes_the_most_likely() -> None:
    assert Sampler(Sampling(top_k=3, seed=4), [0, 1]).choose(LOGITS.expand(2, -1)).tolist() == [
        1,
        1,
    ]


def test_draws_of_a_prompt_differ_from_step_to_step_and_are_repeated() -> None:
    def steps(seed: int, number: int) -> list[int]:
        sampler = Sampler(Sampling(1.0, seed=seed), [number])
        return [int(sampler.choose(LOGITS[None])) for _ in range(30)]

    assert steps(1, 2) == steps(1, 2)
    assert len({tuple(steps(seed, number)) for seed in (1, 2) for number in (0, 1)}) == 4
    assert len(set(steps(1, 2))) > 2


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"temperature": -0.1}, ("temperature", -0.1)),
        ({"temperature": float("nan")}, ("temperature", "nan")),
        ({"top_k": 0}, ("top_k", 0)),
        ({"top_p": 0.0}, ("top_p", 0.0)),
        ({"top_p": 1.5}, ("top_p", 1.5)),
    ],
)
def test_values_out_of_range(settings: dict[str, float], parts: tuple[object, ...]) -> None:
    with user_error(*parts):
        Sampling(**settings)  # type: ignore[arg-type]
