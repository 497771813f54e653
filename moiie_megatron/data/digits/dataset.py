"""Writes the digits data set: visual questions about scanned handwritten digits.

scikit-learn ships 1,797 scans of 8 x 8 pixels (UCI "Optical Recognition of Handwritten
Digits").  Four scans make a picture; a question can be answered only with both the picture and
the words.  No scan is in both the training and the test pictures.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from moiie_megatron.data.digits import questions as ask
from moiie_megatron.data.records.record import PLACEHOLDER
from moiie_megatron.utils.errors import UserError

MANIFEST: Final = "manifest.json"
FORMAT: Final = 3  # increment when the same settings write other files
TEST_FRACTION: Final = 0.2  # of the scans
MARKERS: Final = ("<|user|>", "<|assistant|>", "<|end|>", PLACEHOLDER, "\n")


@dataclass(frozen=True)
class DigitSettings:
    """Everything that the files depend on."""

    seed: int
    train: int
    test: int
    image_size: int
    format: int = FORMAT


@dataclass(frozen=True)
class _Picture:
    """A 2 x 2 grid: its file (relative to images/), its digits, and the scans they come from."""

    file: str
    digits: ask.Grid
    scans: tuple[int, ...]


def write_digits(
    out: str | Path, *, seed: int = 0, train: int = 4000, test: int = 500, image_size: int = 28
) -> Path:
    """Write the data set, or keep an existing one with the same settings.

    Files: ``images/{train,test}/*.png``; ``captions.json`` (one caption per training picture),
    ``train.jsonl`` (conversations: single- and multi-turn, some text-only, few with two
    pictures), ``test.jsonl`` (single questions with their ``kind``), ``text.jsonl`` (text only,
    for pretraining a small language model), ``tokenizer.model`` (SentencePiece with the Phi-3
    markers), ``manifest.json``.

    Args:
        out: The directory; it appears when everything is written.
        seed: Decides pictures and questions.
        train: Number of training pictures.
        test: Number of test pictures.
        image_size: Side in pixels, even; patches of a quarter of it give 2 x 2 patches per digit.

    Returns:
        ``out`` as a path.

    Raises:
        UserError: A number is out of range, or ``out`` holds something else.
    """
    out = Path(out)
    settings = DigitSettings(seed, train, test, image_size)
    if train < 2 or test < 1 or image_size < 16 or image_size % 2:
        raise UserError(
            f"Digits with train={train}, test={test}, image_size={image_size}: use at least 2 "
            "training pictures, 1 test picture, and an even image size of 16 or more."
        )
    if _is_complete(out, settings):
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        scratch.chmod(0o755)
        _write(scratch, settings)
        try:
            os.replace(scratch, out)
        except OSError:  # another process was faster
            if not _is_complete(out, settings):
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out


def _is_complete(out: Path, settings: DigitSettings) -> bool:
    """Whether ``out`` holds this data set.

    Raises:
        UserError: It holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    manifest = out / MANIFEST
    try:
        found = json.loads(manifest.read_text())["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{out} exists and is not a digits data set: name a new directory."
        ) from error
    if found != asdict(settings):
        raise UserError(
            f"{out} holds digits with {found}, not {asdict(settings)}: name a new directory."
        )
    return True


def _write(directory: Path, settings: DigitSettings) -> None:
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    tiles = _tiles(scans.reshape(-1, 8, 8), settings.image_size // 2)
    order = list(range(len(labels)))
    random.Random(f"{settings.seed} split").shuffle(order)
    cut = round(len(order) * TEST_FRACTION)
    pictures: dict[str, list[_Picture]] = {}
    for split, pool, count in (
        ("test", order[:cut], settings.test),
        ("train", order[cut:], settings.train),
    ):
        rng = random.Random(f"{settings.seed} {split} pictures")
        (directory / "images" / split).mkdir(parents=True)
        pictures[split] = []
        for i in range(count):
            chosen = tuple(rng.choices(pool, k=4))
            picture = _Picture(
                f"{split}/{i:05d}.png", tuple(int(labels[s]) for s in chosen), chosen
            )
            _grid(tiles[list(chosen)]).save(directory / "images" / picture.file)
            pictures[split].append(picture)

    rng = random.Random(f"{settings.seed} questions")
    captions = [
        _record(f"caption-{i}", [p], [(ask.caption_request(rng), ask.caption(p.digits, rng))])
        for i, p in enumerate(pictures["train"])
    ]
    (directory / "captions.json").write_text(json.dumps(captions, indent=1), encoding="utf-8")
    counts = {
        "captions": len(captions),
        "train": _write_lines(directory / "train.jsonl", _conversations(pictures["train"], rng)),
        "test": _write_lines(directory / "test.jsonl", _test_questions(pictures["test"], rng)),
        "text": _write_lines(directory / "text.jsonl", _texts(settings.train, rng)),
    }
    tokenizer, vocab_size = train_tokenizer()
    (directory / "tokenizer.model").write_bytes(tokenizer)
    manifest = {"settings": asdict(settings), "records": counts, "vocab_size": vocab_size}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _tiles(scans: np.ndarray, side: int) -> np.ndarray:
    """Resize scans: float (scans, 8, 8) in 0..16 to uint8 (scans, side, side)."""
    pixels = np.round(scans * (255 / 16)).astype(np.uint8)
    resized = [
        np.asarray(Image.fromarray(scan).resize((side, side), Image.Resampling.BICUBIC))
        for scan in pixels
    ]
    return np.stack(resized)


def _grid(tiles: np.ndarray) -> Image.Image:
    """uint8 (4, side, side) in the order of PLACES to one grey picture."""
    return Image.fromarray(np.block([[tiles[0], tiles[1]], [tiles[2], tiles[3]]]))


def _record(
    name: str, pictures: list[_Picture], exchanges: list[tuple[str, str]], kind: str | None = None
) -> dict[str, Any]:
    """A LLaVA record; ``_scans`` and ``kind`` are extra keys that LLaVA readers ignore."""
    conversations = []
    for question, answer in exchanges:
        conversations.append({"from": "human", "value": question})
        conversations.append({"from": "gpt", "value": answer})
    conversations[0]["value"] = f"{PLACEHOLDER}\n" * len(pictures) + conversations[0]["value"]
    record: dict[str, Any] = {"id": name}
    if pictures:
        files = [picture.file for picture in pictures]
        record["image"] = files[0] if len(files) == 1 else files
        record["_scans"] = [scan for picture in pictures for scan in picture.scans]
    if kind is not None:
        record["kind"] = kind
    return {**record, "conversations": conversations}


def _conversations(pictures: list[_Picture], rng: random.Random) -> Iterable[dict[str, Any]]:
    """For every picture a conversation of 1 to 6 questions.

    For every 8th picture also one without a picture, for every 20th one about two pictures.
    """
    for i, picture in enumerate(pictures):
        rounds = rng.choice((1, 2, 4, 6))
        asked = list(dict.fromkeys(ask.about(picture.digits, rng) for _ in range(rounds)))
        yield _record(f"train-{i}", [picture], [(q.question, q.answer) for q in asked])
        if i % 8 == 0:
            sums = ask.arithmetic(rng)
            yield _record(f"train-text-{i}", [], [(sums.question, sums.answer)])
        if i % 20 == 0:
            yield _pair(f"train-two-{i}", pictures, i, rng)


def _pair(name: str, pictures: list[_Picture], first: int, rng: random.Random) -> dict[str, Any]:
    """A question about two pictures, which agree at the place asked for about half of the time."""
    place = rng.randrange(4)
    wanted = rng.random() < 0.5
    digit = pictures[first].digits[place]
    others = [p for p in pictures if (p.digits[place] == digit) == wanted and p != pictures[first]]
    other = rng.choice(others or pictures)
    question = ask.same_digit(place, other.digits[place] == digit)
    return _record(name, [pictures[first], other], [(question.question, question.answer)], "two")


def _test_questions(pictures: list[_Picture], rng: random.Random) -> Iterable[dict[str, Any]]:
    """For every picture three digits and one yes or no; for every 5th also a sum."""
    for i, picture in enumerate(pictures):
        questions = [ask.digit_at(picture.digits, place) for place in rng.sample(range(4), k=3)]
        questions.append(ask.is_digit(picture.digits, rng))
        if i % 5 == 0:
            questions.append(ask.row_sum(picture.digits, rng))
        for number, question in enumerate(questions):
            exchange = [(question.question, question.answer)]
            yield _record(f"test-{i}-{number}", [picture], exchange, question.kind)


def _texts(count: int, rng: random.Random) -> Iterable[dict[str, Any]]:
    for i in range(count):
        question = ask.arithmetic(rng) if rng.random() < 0.2 else ask.described(rng)
        yield _record(f"text-{i}", [], [(question.question, question.answer)])


def _write_lines(file: Path, records: Iterable[dict[str, Any]]) -> int:
    lines = [json.dumps(record) for record in records]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def train_tokenizer() -> tuple[bytes, int]:
    """A SentencePiece model over the question language, at most 256 pieces; deterministic."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(ask.vocabulary()),
        model_writer=model,
        model_type="bpe",
        vocab_size=160,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        user_defined_symbols=list(MARKERS),
        split_digits=True,
        # Decoding returns the exact text, and segments are tokenized as inside a longer text.
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        num_threads=1,
        minloglevel=2,
    )
    processor = SentencePieceProcessor(model_proto=model.getvalue())
    return model.getvalue(), processor.get_piece_size()
