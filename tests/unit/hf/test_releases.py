"""Exports give the same answers with the oldest and the newest transformers that they accept.

``make test`` installs both into directories of their own (``.venv/transformers-VERSION``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from moiie_megatron.hf.auto_files import write_remote_code
from moiie_megatron.hf.modeling_moiie import MoiieForConditionalGeneration
from moiie_megatron.hf.processing_moiie import MoiieProcessor
from moiie_megatron.hf.version_moiie import NEWEST, OLDEST
from tests.unit.hf import release_answers, tiny

ROOT = Path(__file__).parents[3]
# As TRANSFORMERS_VERSIONS in the Makefile.
VERSIONS = ("5.19.0", "5.24.0")
FAMILIES = (("llama", "siglip"), ("phi3", "clip"))
VARIANTS: dict[str, dict[str, Any]] = {
    "moiie": {},
    "vanilla": {"experts": {"shared": 4}},
    "modality": {"experts": {"vision": 2, "text": 2}},
    "dense": {"experts": {}, "moe_layers": []},
}


@pytest.fixture(scope="module")
def models() -> dict[str, MoiieForConditionalGeneration]:
    return {
        f"{family}-{tower}-{name}": tiny.model(tiny.config(family, tower, **changes))
        for family, tower in FAMILIES
        for name, changes in VARIANTS.items()
    }


@pytest.fixture(scope="module")
def pictures(directory: Path) -> Path:
    folder = directory / "release_pictures"
    folder.mkdir()
    for i in range(3):
        tiny.picture(i).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def exports(models: dict[str, Any], directory: Path) -> Path:
    folder = directory / "release_exports"
    processors = {tower: tiny.processor(directory / tower, tower) for _, tower in FAMILIES}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        processors[name.split("-")[1]].save_pretrained(folder / name)
        write_remote_code(folder / name)
    return folder


def _run(exports: Path, pictures: Path, site: Path | None) -> dict[str, Any]:
    out = exports.parent / f"{site.name if site else 'installed'}.json"
    environment = os.environ | {
        "PYTHONPATH": str(site or ""),
        "HF_MODULES_CACHE": str(exports.parent / f"{out.stem}-modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    script = Path(release_answers.__file__)
    done = subprocess.run(
        [sys.executable, str(script), str(exports), str(pictures), str(out)],
        cwd=exports.parent, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def wanted(models: dict[str, Any], processor: MoiieProcessor, pictures: Path) -> dict[str, Any]:
    """Every row alone, by whole forward passes of the installed version."""
    found: dict[str, Any] = {}
    for name, model in models.items():
        prepare = processor if "siglip" in name else tiny.processor(pictures, "clip")
        found[name] = [
            tiny.greedy(
                model, release_answers.inputs(prepare, pictures, (row,)), release_answers.STEPS
            )[0].tolist()
            for row in range(len(release_answers.PROMPTS))
        ]
    return found


def test_the_ends_of_the_range_are_tested() -> None:
    first, last = (Version(version) for version in VERSIONS)
    assert first.release[:2] == OLDEST.release and last.release[:2] == NEWEST.release
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert f"TRANSFORMERS_VERSIONS := {' '.join(VERSIONS)}\n" in makefile


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_answers_are_those_of_whole_forward_passes(
    version: str, exports: Path, pictures: Path, wanted: dict[str, Any]
) -> None:
    site = ROOT / ".venv" / f"transformers-{version}"
    assert (site / "transformers").is_dir(), f"run make {site.relative_to(ROOT)}/.installed"
    result = _run(exports, pictures, site)
    assert result["version"] == version and result["answers"].keys() == wanted.keys()
    wrong = {
        (name, case): (got, [wanted[name][row] for row in rows])
        for name, cases in result["answers"].items()
        for case, (rows, _) in release_answers.CASES.items()
        if (got := cases[case]) != [wanted[name][row] for row in rows]
    }
    assert wrong == {}


def test_the_answers_depend_on_the_token_types(
    models: dict[str, Any], wanted: dict[str, Any], processor: MoiieProcessor, pictures: Path
) -> None:
    """Otherwise wrong types would pass the comparison above."""
    model = models["llama-siglip-moiie"]
    given = release_answers.inputs(processor, pictures, (0,))
    prompt = given["input_ids"].shape[1]
    sequence = torch.tensor([given["input_ids"][0].tolist() + wanted["llama-siglip-moiie"][0]])
    given["input_ids"] = sequence
    types = torch.zeros_like(sequence)
    types[:, :prompt] = given["mm_token_type_ids"]
    ends = []
    for decoded in (0, 1):
        types[:, prompt:] = decoded
        with torch.no_grad():
            embeds = _embeddings(model, given)
            ends.append(model(inputs_embeds=embeds, mm_token_type_ids=types).logits[:, prompt:])
    assert not torch.equal(ends[0].argmax(-1), ends[1].argmax(-1))


def _embeddings(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    embeds = model.get_input_embeddings()(given["input_ids"])
    features = torch.cat(model.get_image_features(given["pixel_values"]).pooler_output)
    is_image = given["mm_token_type_ids"][0].nonzero()[:, 0]
    return embeds.index_copy(1, is_image, features.unsqueeze(0))
