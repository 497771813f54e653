"""Checkpoints of the reference: imported, and exported again, they give the reference's logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moiie_megatron.checkpoint.load_weights import load_weights
from moiie_megatron.config.load import load_config
from moiie_megatron.convert.export import export_checkpoint
from moiie_megatron.convert.import_hf import import_checkpoint
from moiie_megatron.hf.modeling_moiie import MoiieForConditionalGeneration
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.vlm.model import MoIIEModel
from tests.helpers.reference import write_reference
from tests.helpers.tiny_hf import write_vision
from tests.parity import golden, tiny

CASES = ("ones", "pad")


def _megatron(checkpoint: Path, context: ParallelContext) -> MoIIEModel:
    config = load_config(checkpoint / "run.yaml", ["train.device=cpu", "parallel={}"])
    model = tiny.build(config, context).eval()
    load_weights(checkpoint, context, model)
    return model


def _exported_logits(
    model: MoiieForConditionalGeneration, inputs: dict[str, Tensor], case: str
) -> Tensor:
    return model(
        inputs_embeds=inputs[f"{case}.inputs_embeds"],
        attention_mask=inputs[f"{case}.attention_mask"],
        mm_token_type_ids=inputs[f"{case}.token_type_ids"],
    ).logits


@pytest.mark.parametrize("mask", [False, True], ids=["paper-mask", "reference-mask"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
@torch.no_grad()
def test_logits(family: str, mask: bool, context: ParallelContext, tmp_path: Path) -> None:
    encoder = write_vision(tmp_path / "encoder", dtype=torch.float32)
    directory = write_reference(tmp_path / "theirs", encoder, family)
    import_checkpoint(directory, tmp_path / "checkpoint", last_image_token_as_text=mask)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "export")
    megatron = _megatron(tmp_path / "checkpoint", context)
    exported = MoiieForConditionalGeneration.from_pretrained(tmp_path / "export").eval()

    inputs = golden.tensors(f"tiny_{family}_moiie/inputs")
    want = golden.tensors(f"tiny_{family}_moiie/{'reference_mask' if mask else 'outputs'}")
    for case in CASES:
        real = inputs[f"{case}.attention_mask"].bool()
        expected = want[f"{case}.logits"][real]
        golden.assert_close(tiny.forward(megatron, inputs, case)[real], expected, "Megatron")
        golden.assert_close(_exported_logits(exported, inputs, case)[real], expected, "export")


@torch.no_grad()
def test_images_pass_through_the_shortened_tower(context: ParallelContext, tmp_path: Path) -> None:
    """Pictures and text: both models, and the encoder's features by the reference's rule."""
    encoder = write_vision(tmp_path / "encoder", dtype=torch.float32)
    directory = write_reference(tmp_path / "theirs", encoder)
    import_checkpoint(directory, tmp_path / "checkpoint", last_image_token_as_text=True)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "export")
    megatron = _megatron(tmp_path / "checkpoint", context)
    exported = MoiieForConditionalGeneration.from_pretrained(tmp_path / "export").eval()

    from transformers import SiglipVisionModel

    whole = SiglipVisionModel.from_pretrained(encoder).eval()
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    features = whole(images, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(megatron.vision_encoder(images), features, rtol=1e-5, atol=1e-5)

    tokens = torch.randint(1, 256, (2, 12), generator=torch.Generator().manual_seed(2))
    types = torch.zeros(2, 12, dtype=torch.int8)
    types[0, 2:6] = types[1, 8:12] = 1
    ours = megatron(tokens, torch.arange(12).expand(2, 12), types, images=images)
    theirs = exported(
        input_ids=tokens, pixel_values=images, mm_token_type_ids=types, use_cache=False
    ).logits
    assert ours.std() > 0.5
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    megatron.last_image_token_as_text = False
    plain = megatron(tokens, torch.arange(12).expand(2, 12), types, images=images)
    assert (plain - ours).abs().max() > 1e-2
