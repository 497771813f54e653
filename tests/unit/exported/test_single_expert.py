"""One expert alone equals the dense model that extraction writes."""

from __future__ import annotations

from pathlib import Path

import torch

from moiie_megatron.convert.extract import extract_expert
from moiie_megatron.exported.model import ExportedModel
from moiie_megatron.exported.single_expert import expert_names, use_expert
from tests.helpers.tiny_export import ask, picture, write_export
from tests.helpers.user_errors import user_error

CONVERSATIONS = [ask("Hi?"), ask("What is it?", picture(0)), ask("Both?", picture(1), picture(2))]
FREE = {"eos_token_id": -1}


@torch.no_grad()
def test_equals_the_extracted_model(export: Path, model: ExportedModel, tmp_path: Path) -> None:
    assert expert_names(model.model) == ["vision.0", "shared.0", "shared.1", "text.0"]
    prompts = [model.encode(c) for c in CONVERSATIONS]
    inputs = model.batch(prompts)
    seen = [model.model(**inputs).logits]
    for name, full in (("vision", "vision.0"), ("shared.1", "shared.1"), ("text", "text.0")):
        folder = extract_expert(export.parent / "checkpoint", [full], tmp_path / full)
        dense = ExportedModel.load(folder, device="cpu")
        alone = ExportedModel.load(export, device="cpu", expert=name)
        logits = alone.model(**inputs).logits
        torch.testing.assert_close(logits, dense.model(**inputs).logits, rtol=1e-5, atol=1e-5)
        answers = [m.generate(prompts, max_new_tokens=10, generation=FREE) for m in (alone, dense)]
        assert answers[0] == answers[1]
        assert all((logits - other).abs().max() > 1e-2 for other in seen)
        seen.append(logits)


def test_experts_that_are_not_there(export: Path, tmp_path: Path) -> None:
    for name in ("vision.1", "3", "", "shared.2", "dense"):
        with user_error(f"no expert {name}", "vision.0 or shared.0 or shared.1 or text.0"):
            ExportedModel.load(export, device="cpu", expert=name)
    with user_error("shared", "several", "shared.0 or shared.1"):
        ExportedModel.load(export, device="cpu", expert="shared")
    alone = ExportedModel.load(export, device="cpu", expert="text.0").model
    with user_error("load the export again"):
        use_expert(alone, "text.0")
    dense = extract_expert(export.parent / "checkpoint", ["text.0"], tmp_path / "dense")
    with user_error("text.0", "dense"):
        ExportedModel.load(dense, device="cpu", expert="text.0")


def test_vanilla_experts_are_all_shared(tmp_path: Path) -> None:
    vanilla = write_export(tmp_path, variant="vanilla")
    with user_error("no expert text.0", "shared.0 or shared.1 or shared.2 or shared.3"):
        ExportedModel.load(vanilla, device="cpu", expert="text.0")
    alone = ExportedModel.load(vanilla, device="cpu", expert="shared.3")
    assert len(alone.generate([alone.encode(CONVERSATIONS[1])], generation=FREE)[0]) == 64
