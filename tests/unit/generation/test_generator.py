"""Greedy generation is what the model says, whatever stands beside it in the batch."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from moiie_megatron.checkpoint.directory import find_checkpoint
from moiie_megatron.data.encode.images import normalize
from moiie_megatron.data.encode.stop_ids import stop_ids
from moiie_megatron.data.encode.templates import load_template
from moiie_megatron.data.encode.tokenizers import load_tokenizer
from moiie_megatron.data.records.record import Turn
from moiie_megatron.generation.checkpoint_config import checkpoint_config
from moiie_megatron.generation.generator import Generator
from moiie_megatron.generation.prompt import Prompt
from moiie_megatron.layout.token_types import IMAGE, TEXT
from tests.helpers.user_errors import user_error


@pytest.fixture
def prompts(generator: Generator, digits: Path) -> list[Prompt]:
    """Of different lengths and numbers of images."""
    loader = generator.image_loader(digits / "images")
    first, second = (loader.load(f"test/0000{i}.png") for i in range(2))
    return [
        generator.prompt([Turn("user", "<image>\nWhich digit is at the top left?")], [first]),
        generator.prompt([Turn("user", "What is 1 plus 2?")], []),
        generator.prompt(
            [Turn("user", "<image>\n<image>\nIs there a six?")],
            [first, second],
        ),
    ]


def teacher_forced(generator: Generator, prompt: Prompt, answer: list[int]) -> list[int]:
    """The most likely token after every prefix of the answer, from one unpadded pass."""
    new = torch.tensor(answer)
    tokens = torch.cat([prompt.tokens, new])[None]
    types = torch.cat([prompt.token_types, torch.full_like(new, TEXT, dtype=torch.int8)])[None]
    statistics = generator.statistics
    with torch.no_grad():
        logits = generator.model(
            tokens=tokens,
            position_ids=torch.arange(tokens.shape[1])[None],
            token_types=types,
            images=normalize(prompt.images, statistics.mean, statistics.std),
        )
    vocabulary = generator.tokenizer.vocab_size
    return logits[0, len(prompt.tokens) - 1 : -1, :vocabulary].argmax(-1).tolist()


@pytest.fixture
def endless(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> Generator:
    """An untrained model may end at once: here nothing ends an answer."""
    monkeypatch.setattr(generator, "stop_ids", frozenset())
    return generator


def test_greedy_is_the_argmax_after_every_prefix(endless: Generator, prompts: list[Prompt]) -> None:
    generator = endless
    for prompt, answer in zip(prompts, generator.generate(prompts, 5), strict=True):
        assert len(answer) == 5
        assert answer == teacher_forced(generator, prompt, answer)


def test_batch_equals_single(endless: Generator, prompts: list[Prompt]) -> None:
    generator = endless
    together = generator.generate(prompts, 5)
    assert together == [generator.generate([prompt], 5)[0] for prompt in prompts]
    logits = generator.next_token_logits(prompts, [[], [], []])
    alone = [generator.next_token_logits([prompt], [[]])[0] for prompt in prompts]
    torch.testing.assert_close(logits, torch.stack(alone))
    assert logits.shape == (3, generator.tokenizer.vocab_size)


def test_answers_end_at_a_stop_id(
    endless: Generator, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = endless
    free = generator.generate(prompts, 6)
    stop = free[0][-1]
    monkeypatch.setattr(generator, "stop_ids", frozenset([stop]))
    assert generator.generate(prompts[:1], 6) == [free[0][: free[0].index(stop)]]
    expected = [ids[: ids.index(stop)] if stop in ids else ids for ids in free]
    assert generator.generate(prompts, 6) == expected


def test_the_picture_matters_and_blanking_hides_it(generator: Generator, digits: Path) -> None:
    loader = generator.image_loader(digits / "images")
    turns = [Turn("user", "<image>\nIs there a six?")]
    one, two = (generator.prompt(turns, [loader.load(f"test/0000{i}.png")]) for i in range(2))
    seen = generator.next_token_logits([one, two], [[], []])
    assert not torch.allclose(seen[0], seen[1])
    blank = generator.next_token_logits([generator.blanked(one), generator.blanked(two)], [[], []])
    torch.testing.assert_close(blank[0], blank[1])


def test_prompts_are_read_as_in_training(generator: Generator, prompts: list[Prompt]) -> None:
    text = generator.tokenizer.decode(prompts[1].tokens.tolist())
    assert text.endswith("<|user|>\nWhat is 1 plus 2?<|end|>\n<|assistant|>\n")
    assert int((prompts[2].token_types == IMAGE).sum()) == 2 * 16


def test_no_prompts_no_answers(generator: Generator) -> None:
    assert generator.generate([]) == []


def test_too_long(generator: Generator, prompts: list[Prompt]) -> None:
    with user_error("language.max_position_embeddings", 512):
        generator.generate(prompts, 500)


def test_no_tokens(generator: Generator) -> None:
    """Formats without questions write nothing of a prompt without images."""
    nothing = Prompt(torch.empty(0).long(), torch.empty(0).to(torch.int8), torch.empty(0).byte())
    with user_error("no token", "stage.template phi3"):
        generator.generate([nothing])


def test_placeholders_and_images_must_match(generator: Generator) -> None:
    with user_error("1 <image>", "0 images"):
        generator.prompt([Turn("user", "<image>\nWhat?")], [])


def test_a_checkpoint_is_enough(run: Path, digits: Path, tmp_path: Path) -> None:
    folder = find_checkpoint(run)
    assert folder == find_checkpoint(folder) == run / "checkpoints" / "step_0000001"
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    config = checkpoint_config(moved, ["parallel.expert=2"])
    assert config.data.tokenizer == str(moved) and config.parallel.expert == 2
    theirs, ours = load_tokenizer(digits / "tokenizer.model"), load_tokenizer(moved)
    assert ours.encode("Is there a six?") == theirs.encode("Is there a six?")
    with user_error(tmp_path, "step_"):
        find_checkpoint(tmp_path)


def test_stop_ids_of_templates(digits: Path) -> None:
    tokenizer = load_tokenizer(digits / "tokenizer.model")
    end = tokenizer.token_id("<|end|>")
    assert stop_ids(tokenizer, load_template("phi3", tokenizer)) == {tokenizer.eos_id, end}
    assert stop_ids(tokenizer, load_template("plain", tokenizer)) == {tokenizer.eos_id}
