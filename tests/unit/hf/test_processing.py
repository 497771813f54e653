"""The processor against the training side's pixels and ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import AutoTokenizer, CLIPImageProcessorPil, PreTrainedTokenizerFast

from moiie_megatron.data.encode.encoder import encode_prompt
from moiie_megatron.data.encode.images import ImageLoader, normalize
from moiie_megatron.data.encode.templates import load_template
from moiie_megatron.data.encode.tokenizers import load_tokenizer
from moiie_megatron.data.records.record import Turn
from moiie_megatron.families.registry import vision_family
from moiie_megatron.hf.build_processor import build_processor
from moiie_megatron.hf.processing_moiie import MoiieProcessor
from tests.parity import tiny as parity
from tests.unit.hf import tiny


@pytest.fixture(scope="module")
def pictures(directory: Path) -> Path:
    folder = directory / "pictures"
    folder.mkdir()
    tiny.picture(0, 41, 29).save(folder / "wide.png")
    tiny.picture(1, 20, 55).save(folder / "tall.png")
    tiny.picture(2, 30, 30).convert("L").save(folder / "grey.png")
    transparent = tiny.picture(3, 33, 27)
    transparent.putalpha(tiny.picture(4, 33, 27).convert("L"))
    transparent.save(folder / "transparent.png")
    deep = np.random.default_rng(5).integers(0, 65536, (25, 35)).astype(np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    tiny.picture(6, 44, 22).save(folder / "turned.png", exif=exif)
    return folder


@pytest.mark.parametrize("mode", ["square", "pad"])
@pytest.mark.parametrize("family", ["siglip", "clip"])
def test_pixels_equal_training(family: Any, mode: Any, pictures: Path, tmp_path: Path) -> None:
    processor = tiny.processor(tmp_path, family, mode)
    mean, std = vision_family(family).statistics.mean, vision_family(family).statistics.std
    loader = ImageLoader(pictures, 28, mode, mean)
    names = sorted(path.name for path in pictures.iterdir())
    assert len(names) == 6
    want = torch.stack([loader.load(name) for name in names])
    images = [Image.open(pictures / name) for name in names]
    got = processor(text="<image>" * 6, images=images, return_tensors="pt")["pixel_values"]
    mean_t, std_t = (torch.tensor(x).view(1, 3, 1, 1) for x in (mean, std))
    assert torch.equal(((got * std_t + mean_t) * 255).round().byte(), want)
    assert torch.equal(got, normalize(want, mean, std))


def test_modes_differ(tmp_path: Path) -> None:
    image = tiny.picture(0, 60, 20)
    pixels = [
        tiny.processor(tmp_path / mode, "siglip", mode)(
            text="<image>", images=[image], return_tensors="pt"
        )["pixel_values"]
        for mode in ("square", "pad")
    ]
    assert (pixels[0] - pixels[1]).abs().max() > 0.5
    assert (pixels[1][0, :, 0] - (127 / 255 - 0.5) / 0.5).abs().max() < 1e-6  # the mean colour


def test_arrays_and_published_clip_settings(processor: MoiieProcessor) -> None:
    """A published CLIP processor crops the middle; the whole image is wanted here."""
    published = CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    clip = MoiieProcessor(published, processor.tokenizer, num_image_tokens=16)
    plain = MoiieProcessor(
        CLIPImageProcessorPil(size={"height": 28, "width": 28}, do_center_crop=False),
        processor.tokenizer,
        num_image_tokens=16,
    )
    image = tiny.picture(0, 60, 20)
    want = plain(text="<image>", images=[image], return_tensors="pt")["pixel_values"]
    for same in (image, np.asarray(image), torch.from_numpy(np.array(image)).permute(2, 0, 1)):
        got = clip(text="<image>", images=[same], return_tensors="pt")["pixel_values"]
        assert torch.equal(got, want)


def test_ids_and_types_equal_training(processor: MoiieProcessor, tmp_path: Path) -> None:
    """The image token is not in the tokenizer: training and export give it the same id."""
    tokenizer = load_tokenizer(tiny.tokenizer_directory(tmp_path / "tokenizer"))
    assert tokenizer.image_id == processor.image_token_id == 258
    template = load_template("plain", tokenizer)
    turns = [Turn("user", "<image>\nand <image> what?")]
    ids, types = encode_prompt(turns, tokenizer, template, tiny.IMAGE_TOKENS)
    text = "".join(s.text for s in template.render(turns, add_generation_prompt=True))
    inputs = processor(
        text="<s>" + text,
        images=[tiny.picture(0)] * text.count("<image>"),
        return_tensors="pt",
    )
    assert inputs["input_ids"][0].tolist() == ids.tolist()
    assert inputs["mm_token_type_ids"][0].tolist() == types.tolist()
    assert types.sum() == 16 * text.count("<image>") > 0


def test_rows_are_padded_at_the_left(processor: MoiieProcessor) -> None:
    inputs = processor(
        text=["<s>a <image>", "<s>b"], images=[tiny.picture(0)], padding=True, return_tensors="pt"
    )
    assert inputs["input_ids"].shape == inputs["mm_token_type_ids"].shape == (2, 19)
    assert inputs["input_ids"][1, :-2].unique().tolist() == [257]
    assert inputs["attention_mask"].sum(dim=1).tolist() == [19, 2]
    assert inputs["mm_token_type_ids"].sum(dim=1).tolist() == [16, 0]


def test_another_number_of_images_is_refused(processor: MoiieProcessor) -> None:
    few = "Found total 2 <image> tokens and 1 images|more <image> tokens than there are images"
    with pytest.raises(ValueError, match=few):
        processor(text="<image> <image>", images=[tiny.picture(0)])
    if Version(transformers.__version__) < Version("5.23"):  # the model refuses it
        assert processor(text="<image>")["mm_token_type_ids"] == [[1]]
        return
    with pytest.raises(ValueError, match="no images were passed"):
        processor(text="<image>")


def test_saved_and_loaded(processor: MoiieProcessor, tmp_path: Path) -> None:
    """With the padding side, which a tokenizer alone forgets, and the added image token."""
    padded = MoiieProcessor(
        processor.image_processor,
        processor.tokenizer,
        num_image_tokens=16,
        image_mode="pad",
        chat_template="{{ messages[0]['content'] }}",
    )
    padded.save_pretrained(tmp_path)
    loaded = MoiieProcessor.from_pretrained(tmp_path)
    assert (loaded.num_image_tokens, loaded.image_mode, loaded.image_token_id) == (16, "pad", 258)
    assert loaded.chat_template == padded.chat_template
    plain = AutoTokenizer.from_pretrained(tmp_path)
    assert (plain.padding_side, plain.pad_token_id) == ("left", 257)
    call = {"text": "<s><image> x", "images": [tiny.picture(0, 60, 20)], "return_tensors": "pt"}
    got, want = loaded(**call), padded(**call)
    assert set(got) == set(want) and all(torch.equal(got[k], want[k]) for k in want)


def test_wrong_settings_are_refused(processor: MoiieProcessor) -> None:
    image_processor, tokenizer = processor.image_processor, processor.tokenizer
    with pytest.raises(ValueError, match="image_mode is crop: use square or pad"):
        MoiieProcessor(image_processor, tokenizer, image_mode="crop")
    with pytest.raises(ValueError, match="does not know the image token <pic>"):
        MoiieProcessor(image_processor, tokenizer, image_token="<pic>")
    oblong = CLIPImageProcessorPil(size={"height": 28, "width": 14}, do_center_crop=False)
    with pytest.raises(ValueError, match="use one height and equal width"):
        MoiieProcessor(oblong, tokenizer)


def test_an_image_token_behind_ids_with_a_gap(tmp_path: Path) -> None:
    backend = Backend(models.BPE({"a": 0, "b": 7}, []))
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="b")
    fast.save_pretrained(tmp_path)
    processor = build_processor(tmp_path, parity.vision(), "square")
    assert processor.image_token_id == load_tokenizer(tmp_path).image_id == 8
