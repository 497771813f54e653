"""Real files for the data tests: tokenizers whose ids are easy to follow, images, records."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from PIL import Image
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moiie_megatron.data.encode.encoding import Encoding
from moiie_megatron.data.encode.images import ImageLoader
from moiie_megatron.data.encode.templates import load_template
from moiie_megatron.data.encode.tokenizers import Tokenizer, load_tokenizer
from moiie_megatron.data.records.llava import RecordFile
from moiie_megatron.data.stream.dataset import LlavaDataset, Source

LLAMA3_TOKENS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>",
)  # fmt: skip
CHATML = (
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>"
    "{{ m['content'] }}<|eot_id|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
)


@pytest.fixture(scope="session")
def llama3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: every byte is a token, plus the Llama-3 markers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(LLAMA3_TOKENS))
    backend.enable_truncation(3)  # saved with the file; must not shorten anything
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    )
    fast.chat_template = CHATML
    folder = tmp_path_factory.mktemp("llama3")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama3(llama3_folder: Path) -> Tokenizer:
    return load_tokenizer(llama3_folder)


@pytest.fixture(scope="session")
def phi3_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model with dummy prefix; <|end|> is a control piece, the rest is not."""
    model = io.BytesIO()
    text = ["a red cat sits on the mat", "what is it? it is 7 or 3", "two  spaces\nand a line"] * 9
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, model_type="bpe", vocab_size=80,
        unk_id=0, bos_id=1, eos_id=2, pad_id=3, control_symbols=["<|end|>"],
        user_defined_symbols=["<|user|>", "<|assistant|>", "<image>"], minloglevel=2,
        remove_extra_whitespaces=False, normalization_rule_name="identity", num_threads=1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("phi3") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def phi3(phi3_model: Path) -> Tokenizer:
    return load_tokenizer(phi3_model)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with 23 records: numbered answers; every third without image, one with two."""
    (tmp_path / "images").mkdir()
    records = []
    for i in range(23):
        record = {
            "id": f"r{i}",
            "conversations": [
                {"from": "human", "value": "what is it?"},
                {"from": "gpt", "value": "it is " + "7" * (i + 1)},
            ],
        }
        if i % 3:
            pixels = np.full((6, 9, 3), 10 * i, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
            record["image"] = f"{i}.png" if i != 4 else ["4.png", "2.png"]
        records.append(record)
    lines = "\n".join(json.dumps(record) for record in records)
    (tmp_path / "records.jsonl").write_text(lines + "\n")
    return tmp_path


@pytest.fixture
def dataset(corpus: Path, phi3: Tokenizer) -> LlavaDataset:
    half = (0.5, 0.5, 0.5)
    images = ImageLoader(corpus / "images", 8, "square", half)
    source = Source(RecordFile(corpus / "records.jsonl"), images)
    return LlavaDataset([source], Encoding(phi3, load_template("phi3", phi3), 4, 64))


@pytest.fixture
def damaged(dataset: LlavaDataset, corpus: Path) -> LlavaDataset:
    """The images of records 5, 7 and 11 are not images."""
    for i in (5, 7, 11):
        (corpus / "images" / f"{i}.png").write_bytes(b"not an image")
    return dataset
