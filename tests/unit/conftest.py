"""A model with experts that was trained for one step on a few digits, and its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moiie_megatron.checkpoint.directory import find_checkpoint
from moiie_megatron.config.load import load_config
from moiie_megatron.data.digits.dataset import write_digits
from moiie_megatron.generation.checkpoint_config import checkpoint_config
from moiie_megatron.generation.generator import Generator
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.training.loop import train

CONFIG = Path(__file__).resolve().parents[2] / "examples" / "configs" / "digits-stage2.yaml"


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("data") / "digits", train=8, test=3)


@pytest.fixture(scope="module")
def run(digits: Path, context: ParallelContext, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a finished run of one step."""
    output = tmp_path_factory.mktemp("run")
    sources = [{"records": str(digits / "train.jsonl"), "images": str(digits / "images")}]
    overrides = [
        f"output={output}",
        f"data.sources={json.dumps(sources)}",
        f"data.tokenizer={digits / 'tokenizer.model'}",
        "checkpoint.init_from=null",
        "parallel={}",
        "language.vocab_size=168",  # more than the tokenizer has
        "language.hidden_size=64",
        "train.steps=1",
        "train.global_batch_size=2",
        "train.micro_batch_size=2",
    ]
    train(load_config(CONFIG, overrides), context)
    return output


@pytest.fixture(scope="module")
def generator(run: Path, context: ParallelContext) -> Generator:
    folder = find_checkpoint(run)
    return Generator.load(folder, checkpoint_config(folder), context)
