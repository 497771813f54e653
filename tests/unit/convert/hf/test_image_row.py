"""Exports of models without a row for the image token get one, which goes again on the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from moiie_megatron.config.load import load_config
from moiie_megatron.convert.export import export_checkpoint
from moiie_megatron.convert.import_hf import import_checkpoint
from moiie_megatron.convert.open_model import open_weights
from moiie_megatron.convert.upcycle import UpcycleOptions, upcycle_checkpoint
from moiie_megatron.convert.verify import compare_tensors
from tests.helpers.checkpoints import plain_tensors
from tests.helpers.tiny_hf import write_language, write_vision

EMBEDDINGS, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
WORDS = 4  # of the tokenizer, all in the table
CASES = {"llama": False, "llama-tied": True, "phi3": False}


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``checkpoint``, its ``export``, that imported as ``back``, and that exported ``again``."""
    folder = tmp_path_factory.mktemp(request.param)
    changes = {"tie_word_embeddings": CASES[request.param], "vocab_size": WORDS}
    dtype = torch.float32
    llm = write_language(folder / "llm", request.param.split("-")[0], dtype, **changes)
    tower = write_vision(folder / "vision", dtype=dtype)
    upcycle_checkpoint(llm, tower, folder / "checkpoint", UpcycleOptions(perturb=0.1))
    export_checkpoint(folder / "checkpoint", folder / "export")
    import_checkpoint(folder / "export", folder / "back")
    export_checkpoint(folder / "back", folder / "again")
    return folder


def test_the_table_has_a_row_for_every_token(folder: Path) -> None:
    export = folder / "export"
    config = json.loads((export / "config.json").read_text())
    weights = load_file(export / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert tokenizer.convert_tokens_to_ids("<image>") == config["image_token_id"] == WORDS
    assert config["text_config"]["vocab_size"] == len(tokenizer) == WORDS + 1
    assert config["num_added_tokens"] == 1
    for name in {EMBEDDINGS, HEAD} & set(weights):
        assert len(weights[name]) == WORDS + 1
        assert not weights[name][WORDS].any() and weights[name][WORDS - 1].any()


def test_it_comes_back_without_the_row(folder: Path) -> None:
    before, after = (plain_tensors(folder / name) for name in ("checkpoint", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    sections = [load_config(folder / name / "run.yaml").language for name in ("checkpoint", "back")]
    assert sections[0] == sections[1] and sections[1].vocab_size == WORDS
    report = compare_tensors(*(open_weights(folder / name) for name in ("checkpoint", "export")))
    assert report.is_equal
    for name in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        assert (folder / "again" / name).read_bytes() == (folder / "export" / name).read_bytes()


def test_it_is_never_generated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(folder / "modules"))
    model: Any = AutoModelForImageTextToText.from_pretrained(
        folder / "export", trust_remote_code=True
    )
    ids = torch.tensor([[3, 1, WORDS, 2]])  # typed, without a picture
    types = torch.zeros_like(ids)
    with torch.no_grad():
        output = model(ids, mm_token_type_ids=types, labels=torch.tensor([[3, 1, 2, 2]]))
        hidden = model.model(ids, mm_token_type_ids=types).last_hidden_state
    want = hidden @ model.lm_head.weight[:WORDS].T
    torch.testing.assert_close(output.logits[..., :WORDS], want)
    assert (output.logits[..., WORDS] == torch.finfo(torch.float32).min).all()
    loss = torch.nn.functional.cross_entropy(want[0, :-1], torch.tensor([1, 2, 2]))
    torch.testing.assert_close(output.loss, loss)
    with torch.no_grad():
        model.lm_head.weight[WORDS] = 100 * hidden[0, -1]  # it would win
        assert model.generate(ids, mm_token_type_ids=types, max_new_tokens=1)[0, -1] != WORDS
    added = model.resize_token_embeddings(WORDS + 3)
    with torch.no_grad():
        assert len(added.weight) == WORDS + 3
        logits = model(ids, mm_token_type_ids=types).logits
    assert (logits[..., WORDS + 1 :] > -100).all() and (logits[..., WORDS] < -100).all()
