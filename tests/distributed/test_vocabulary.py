"""A vocabulary of 41 tokens on two tensor-parallel ranks: padded, and never seen."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from moiie_megatron.checkpoint.directory import CONFIG_FILE
from moiie_megatron.checkpoint.load_weights import load_weights
from moiie_megatron.config.load import load_config
from moiie_megatron.convert.dcp.reader import CheckpointReader
from moiie_megatron.convert.export import export_checkpoint
from moiie_megatron.convert.open_model import open_weights
from moiie_megatron.convert.upcycle import upcycle_checkpoint
from moiie_megatron.convert.verify import compare_tensors
from moiie_megatron.families.weight_map import VOCABULARY
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.vlm.build import build_model
from tests.distributed.vocabulary_worker import VOCAB, inputs, outputs
from tests.helpers.checkpoints import plain_tensors
from tests.helpers.launch import command, run
from tests.helpers.tiny_hf import write_language, write_vision

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]
PADDED = 256  # twice 128


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    llm = write_language(folder / "llm", dtype=torch.float32, vocab_size=VOCAB)
    vision = write_vision(folder / "vision", dtype=torch.float32)
    source = upcycle_checkpoint(llm, vision, folder / "source")
    run(command("tests/distributed/vocabulary_worker.py", [source, folder], 2), 300).check()
    return folder


def test_losses_logits_and_gradients_are_those_of_one_rank(
    results: Path, context: ParallelContext
) -> None:
    config = load_config(results / "source" / CONFIG_FILE, ["train.device=cpu"])
    model = build_model(config, context)
    load_weights(results / "source", context, model)
    expected = outputs(model)
    model(**inputs()).sum().backward()
    ranks = [torch.load(results / f"rank{rank}.pt") for rank in (0, 1)]
    for found in ranks:
        assert found["logits"].shape == (2, 16, VOCAB)
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values)
    for name in ("embedding.word_embeddings", "output_layer"):
        weight = model.language_model.get_submodule(name).weight
        whole = torch.cat([found[name] for found in ranks])
        assert whole.shape[0] == PADDED and not whole[VOCAB:].any()
        torch.testing.assert_close(whole[:VOCAB], weight.grad, rtol=1e-4, atol=1e-3)


def test_every_layout_goes_on_from_every_other(results: Path) -> None:
    """With weights and optimizer state of all tokens, bit for bit."""
    first = plain_tensors(results / "tp2")
    tables = [name for name in first if name.endswith(VOCABULARY)]
    assert len(tables) == 2 * 4  # the weights, Adam's moments and fp32 copies
    rows = {"tp2": PADDED, "dp2": VOCAB, "resharded": VOCAB, "dp2-tp2": PADDED}
    for checkpoint, size in (rows | {"resharded-tp2": PADDED}).items():
        found = plain_tensors(results / checkpoint)
        assert found.keys() == first.keys()
        assert {len(found[name]) for name in tables} == {size}, checkpoint
        for name, values in found.items():
            is_table = name in tables
            expected = first[name][:VOCAB] if is_table else first[name]
            assert torch.equal(values[:VOCAB] if is_table else values, expected), name


def test_conversions_leave_the_padding_out(results: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(results / "source" / name, results / "tp2" / name)
    reader = CheckpointReader(results / "tp2")
    assert reader.info(VOCABULARY[0]).shape == (VOCAB, 32)
    export = export_checkpoint(results / "tp2", tmp_path / "export")
    for other in (results / "dp2", export):
        assert compare_tensors(open_weights(results / "tp2"), open_weights(other)).is_equal
