"""Tiny tokenizers of the kinds that users have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as splits
from transformers import PreTrainedTokenizerFast

MARKERS: Final = (
    "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|im_start|>", "<|im_end|>",
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
)  # fmt: skip
TEXT: Final = (
    "What is on the bus? An advertisement. A red bus and  two  dogs.\n\nIs it 7 or 3? It is 7.",
    "user assistant system USER: ASSISTANT: [INST] [/INST] Today Date: 26 Jul 2024\n    Help.",
    "caf\u00e9 na\u00efve \u4e2d\u6587 Be brief. \tYes, no (and more): {so}. a_b <c> |d| /e",
)
_SPACE: Final = "\u2581"


def byte_level(folder: Path, **options: Any) -> Path:
    """As Llama 3, Qwen and GPT-2: the first puts BOS in front by a post-processor."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = splits.ByteLevel(add_prefix_space=options.pop("prefix_space", False))
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=330, initial_alphabet=splits.ByteLevel.alphabet())
    )
    level = processors.ByteLevel(trim_offsets=True)
    return _finished(folder, backend, level=level, **options)


def sentence_bpe(folder: Path, *, prefix: str | None = None, **options: Any) -> Path:
    """As Llama 2: spaces are characters; ``prefix`` is Metaspace's, else one by normalizers."""
    metaspace = splits.Metaspace(_SPACE, prepend_scheme="never", split=False)
    alphabet = [f"<0x{i:02X}>" for i in range(256)]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = splits.Sequence([metaspace, splits.Split(_SPACE, "merged_with_next")])
    backend.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=420, special_tokens=["<unk>", *alphabet])
    )
    trained = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    backend = Tokenizer(
        models.BPE(trained["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if prefix is None:
        steps = [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
        backend.normalizer = normalizers.Sequence(steps)
    else:
        backend.pre_tokenizer = splits.Metaspace(_SPACE, prepend_scheme=prefix, split=False)
    _sentence_decoder(backend)
    return _finished(folder, backend, **options)


def unigram(folder: Path) -> Path:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = splits.Metaspace(_SPACE, prepend_scheme="always")
    backend.train_from_iterator(
        TEXT, trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>")
    )
    backend.decoder = decoders.Metaspace(_SPACE, prepend_scheme="always")
    return _finished(folder, backend)


def word_piece(folder: Path) -> Path:
    """As BERT: lower case, [CLS] and [SEP] by a post-processor, no BOS."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = splits.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(
        TEXT,
        trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[CLS]", "[SEP]"]),
    )
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return _finished(folder, backend, bos=None, eos="[SEP]")


def model(folder: Path, added: str | None = None, *, dummy_prefix: bool = True) -> Path:
    """A SentencePiece ``tokenizer.model``, alone or beside a file of added tokens."""
    own = () if added else MARKERS
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXT for line in text.split("\n") if line] * 4),
        model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=370 + len(own),
        byte_fallback=True, add_dummy_prefix=dummy_prefix, remove_extra_whitespaces=False,
        normalization_rule_name="identity", user_defined_symbols=list(own), minloglevel=2,
        num_threads=1,
    )  # fmt: skip
    ids = {marker: 370 + i for i, marker in enumerate(MARKERS)}
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    if added == "added_tokens.json":
        (folder / added).write_text(json.dumps(ids))
        special = {"bos_token": "<s>", "eos_token": "<|end|>"}
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
    elif added:
        tokens = {str(i): {"content": m, "special": True, **flags} for m, i in ids.items()}
        values = {"added_tokens_decoder": tokens, "bos_token": "<s>", "eos_token": "</s>"}
        (folder / added).write_text(json.dumps(values))
    return folder


def _finished(
    folder: Path,
    backend: Any,
    *,
    bos: str | None = "<s>",
    eos: str = "</s>",
    adds: str = "bos",
    level: Any = None,
    image: bool = False,
    **flags: bool,
) -> Path:
    """Saved, with the markers (``flags``) and what the post-processor adds (``adds``)."""
    special = [token for token in dict.fromkeys((bos, eos)) if token]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokens = [*MARKERS, "<image>"] if image else MARKERS
    backend.add_special_tokens([AddedToken(t, normalized=False, **flags) for t in tokens])
    if bos and adds:
        ends = f"{bos}:0 $A:0" + (f" {eos}:0" if "eos" in adds else "")
        template = processors.TemplateProcessing(
            single=ends, special_tokens=[(t, backend.token_to_id(t)) for t in special]
        )
        parts = [level, template] if level is not None else [template]
        backend.post_processor = processors.Sequence(parts)
    elif level is not None:
        backend.post_processor = level
    names = {"eos_token": eos, **({"bos_token": bos} if bos else {})}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return folder


def _sentence_decoder(backend: Any) -> None:
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])


KINDS: Final[dict[str, Callable[[Path], Path]]] = {
    "llama3": lambda folder: byte_level(folder, adds="bos"),
    "qwen": lambda folder: byte_level(folder, bos=None, eos="<|endoftext|>"),
    "gpt2": lambda folder: byte_level(folder, bos="<|endoftext|>", eos="<|endoftext|>", adds=""),
    "prefix-space": lambda folder: byte_level(folder, prefix_space=True, image=True),
    "llama2": sentence_bpe,
    "metaspace-first": lambda folder: sentence_bpe(folder, prefix="first"),
    "metaspace-always": lambda folder: sentence_bpe(folder, prefix="always"),
    "metaspace-never": lambda folder: sentence_bpe(folder, prefix="never"),
    "phi3-rstrip": lambda folder: sentence_bpe(folder, rstrip=True),
    "lstrip": lambda folder: sentence_bpe(folder, lstrip=True, image=True),
    "adds-eos": lambda folder: sentence_bpe(folder, prefix="first", adds="bos eos"),
    "unigram": unigram,
    "wordpiece": word_piece,
    "model": model,
    "model-without-prefix": lambda folder: model(folder, dummy_prefix=False),
    "model-added-tokens": lambda folder: model(folder, "added_tokens.json"),
    "model-decoder": lambda folder: model(folder, "tokenizer_config.json"),
}
