"""From a configuration to batches: the whole data side on the digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.digits.dataset import write_digits
from moiie_megatron.data.stream.build import build_dataset, build_train_loader
from tests.helpers.user_errors import user_error


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits") / "d", train=40, test=5)


def config(digits: Path, *, tokenizer: str = "tokenizer.model", **changes: Any) -> RunConfig:
    vocab_size = json.loads((digits / "manifest.json").read_text())["vocab_size"]
    values: dict[str, Any] = {
        "output": "unused",
        "language": {
            "family": "phi3", "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64,
            "num_attention_heads": 2, "num_query_groups": 2, "vocab_size": vocab_size,
            "max_position_embeddings": 256,
        },
        "vision": {
            "family": "clip", "hidden_size": 32, "ffn_hidden_size": 64, "num_layers": 2,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 7, "activation": "gelu",
        },
        "stage": {
            "name": "s", "moe": False, "learning_rates": {}, "template": "phi3",
            "image_mode": "pad",
        },
        "data": {
            "sources": [
                {"records": str(digits / "train.jsonl"), "images": str(digits / "images")},
                {"records": str(digits / "captions.json"), "images": str(digits / "images")},
            ],
            "tokenizer": str(digits / tokenizer), "sequence_length": 128, "num_workers": 0,
        },
        "train": {"global_batch_size": 4, "micro_batch_size": 2},
    }  # fmt: skip
    for path, value in changes.items():
        section, key = path.split("__")
        values.setdefault(section, {})[key] = value
    return RunConfig.model_validate(values)


def test_batches_of_the_digits(digits: Path) -> None:
    run = config(digits, parallel__tensor=2)
    dataset = build_dataset(run)
    assert len(dataset) == 40 + 5 + 2 + 40  # conversations, text-only, pairs, captions
    assert dataset.sources[0].images.mean[0] == pytest.approx(0.48145466)
    steps = build_train_loader(run, dataset, consumed_samples=0, dp_rank=1, dp_size=2)
    seen = set()
    for _ in range(30):
        (batch,) = next(steps)
        assert batch.tokens.shape[0] == 2 and batch.tokens.shape[1] % 2 == 0
        assert int((batch.token_types == 1).sum()) == 16 * len(batch.images)
        assert batch.num_label_tokens > 0 and not batch.skipped_samples
        seen |= {len(batch.images)}
    assert len(seen) > 1


def test_padding_to_the_sequence_length(digits: Path) -> None:
    run = config(digits, data__padding="sequence_length")
    dataset = build_dataset(run)
    step = next(build_train_loader(run, dataset, consumed_samples=0, dp_rank=0, dp_size=1))
    assert [batch.tokens.shape for batch in step] == [(2, 128)] * 2


def test_the_captions_of_stage_one(digits: Path) -> None:
    dataset = build_dataset(config(digits, stage__template="plain"))
    encoded = dataset[len(dataset) - 1].encoded
    trainable = [i for i in encoded.labels.tolist() if i != -100]
    records = dataset.sources[-1].records
    caption = records[len(records) - 1].turns[1].text
    assert dataset.encoding.tokenizer.decode(trainable) == caption + "</s>"


def test_what_does_not_fit_is_said_at_once(digits: Path) -> None:
    with user_error("data.tokenizer", 160, "language.vocab_size is 100"):
        build_dataset(config(digits, language__vocab_size=100))
    with user_error("stage.template is llama3", "<|begin_of_text|>"):
        build_dataset(config(digits, stage__template="llama3"))
    with user_error("data.tokenizer", "none.model does not exist"):
        build_dataset(config(digits, tokenizer="none.model"))
    source = [{"records": str(digits / "train.jsonl"), "images": str(digits / "none")}]
    with user_error("image directory", digits / "none"):
        build_dataset(config(digits, data__sources=source))
