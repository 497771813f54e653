"""Comparing two models on disk: what is equal, what is skipped, and what is found."""

from __future__ import annotations

import math
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moiie_megatron.checkpoint.directory import FORMAT_VERSION
from moiie_megatron.convert.export import export_checkpoint
from moiie_megatron.convert.import_hf import import_checkpoint
from moiie_megatron.convert.open_model import Weights, open_weights
from moiie_megatron.convert.upcycle import UpcycleOptions, upcycle_checkpoint
from moiie_megatron.convert.verify import TensorReport, compare_tensors
from tests.helpers.reference import write_reference
from tests.helpers.tiny_hf import write_language, write_tokenizer, write_vision
from tests.helpers.user_errors import user_error
from tests.parity import hf_models


@pytest.fixture(scope="module", params=["llama", "phi3"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``llm`` and ``vision`` -> ``checkpoint`` -> ``export``."""
    return _make(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _make(tmp_path_factory.mktemp("llama"), "llama")


def _make(folder: Path, family: str) -> Path:
    llm, vision = write_language(folder / "llm", family), write_vision(folder / "vision")
    export_checkpoint(upcycle_checkpoint(llm, vision, folder / "checkpoint"), folder / "export")
    return folder


def _compare(a: Path, b: Path) -> TensorReport:
    return compare_tensors(open_weights(a), open_weights(b))


def _changed(directory: Path, copy: Path, name: str, change: object) -> Path:
    """A copy of a Hugging Face directory with one tensor changed, or without it."""
    shutil.copytree(directory, copy)
    tensors = load_file(copy / "model.safetensors")
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors[name].clone())  # type: ignore[operator]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


def test_a_round_trip_is_equal(models: Path) -> None:
    for a, b in (("checkpoint", "export"), ("export", "checkpoint"), ("llm", "llm")):
        report = _compare(models / a, models / b)
        assert report.is_equal and not report.skipped and not report.dense_pairs
        assert report.compared == len(open_weights(models / a).keys)
        assert report.lines()[0] == f"tensors: {report.compared} compared, {report.compared} equal"


@pytest.mark.parametrize("other", ["checkpoint", "export"])
@pytest.mark.parametrize("is_turned", [False, True])
def test_upcycled_experts_equal_the_dense_ffn(models: Path, other: str, is_turned: bool) -> None:
    pair = (models / "llm", models / other)
    report = _compare(*(reversed(pair) if is_turned else pair))
    assert report.is_equal
    # 4 experts in 2 layers with 2 tensors each
    assert report.dense_pairs == 4 * 2 * 2
    # embedding, head, final norm; 3 of attention and 1 norm in each layer; 2 dense FFNs
    assert report.compared == 16 + 3 + 4 * 4 + 2 * 2
    assert {part.split()[0]: n for part, n in report.skipped.items()} == {
        "routers": 4,
        "vision": 37,
        "connector": 4,
    }


def test_one_expert_that_differs(llama: Path, tmp_path: Path) -> None:
    def change(tensor: Tensor) -> Tensor:
        tensor[3, 5] += 0.5
        return tensor

    name = "model.language_model.layers.3.mlp.experts.2.up_proj.weight"
    changed = _changed(llama / "export", tmp_path / "changed", name, change)
    before, after = (load_file(f / "model.safetensors")[name] for f in (llama / "export", changed))
    for other in (llama / "checkpoint", llama / "llm"):
        report = _compare(other, changed)
        (found,) = report.mismatches
        layer = "language_model.decoder.layers.3.mlp.experts.experts"
        assert found.name == f"{layer}.linear_fc1.weight [shared.1]"
        assert found.shape_a == found.shape_b == (96, 32)
        assert found.difference == (after.float() - before.float()).abs().max().item() > 0.4
        assert not report.is_equal and report.lines()[-1].endswith(found.name)
        assert report.lines()[0].endswith(
            f"{report.compared} compared, {report.compared - 1} equal"
        )


def test_values_in_another_dtype(llama: Path, tmp_path: Path) -> None:
    """Equal values are equal; what was rounded is not."""
    wide = tmp_path / "wide"
    shutil.copytree(llama / "llm", wide)
    tensors = {n: t.float() for n, t in load_file(wide / "model.safetensors").items()}
    save_file(tensors, wide / "model.safetensors", {"format": "pt"})
    report = _compare(wide, llama / "checkpoint")
    assert report.is_equal and report.other_dtype == report.compared > 0
    assert "in value, stored in another dtype" in report.lines()[1]
    name = "model.norm.weight"
    rounded = _changed(wide, tmp_path / "rounded", name, lambda tensor: tensor + 2.0**-12)
    (found,) = _compare(llama / "checkpoint", rounded).mismatches
    assert found.difference == 2.0**-12 and found.name.endswith("final_layernorm.weight")


def test_signs_and_nans_are_seen(llama: Path, tmp_path: Path) -> None:
    name = "model.norm.weight"
    zero, minus, nan = (
        _changed(llama / "llm", tmp_path / str(value), name, lambda t, v=value: t.fill_(v))
        for value in (0.0, -0.0, math.nan)
    )
    assert _compare(nan, nan).is_equal
    assert math.isnan(_compare(zero, nan).mismatches[0].difference)
    assert _compare(zero, minus).mismatches[0].difference == 0


def test_the_table_is_short(llama: Path, tmp_path: Path) -> None:
    other = upcycle_checkpoint(
        llama / "llm",
        llama / "vision",
        tmp_path / "other",
        UpcycleOptions(perturb=0.1, layers="all"),
    )
    report = _compare(llama / "checkpoint", other)
    # In layers 0 and 2 experts meet dense FFNs; in the others experts meet experts.
    assert report.dense_pairs == 16 and len(report.mismatches) == 4 * 4 * 2
    rows = [line for line in report.lines() if "experts.experts" in line]
    assert len(rows) == 20 and report.lines()[-1].strip() == "... and 12 more"
    assert sum(report.skipped.values()) == 4  # the routers of layers 0 and 2


def test_what_only_one_side_has(llama: Path, tmp_path: Path) -> None:
    tied = write_language(tmp_path / "tied", tie_word_embeddings=True)
    found = {m.name: m for m in _compare(tied, llama / "llm").mismatches}
    head = found["language_model.output_layer.weight"]
    assert head.shape_a is None and head.shape_b == (40, 32) and head.difference is None
    (found_b,) = [m for m in _compare(llama / "llm", tied).mismatches if "output" in m.name]
    assert (found_b.shape_a, found_b.shape_b) == ((40, 32), None)
    # Routers of different kinds are no matter of nature.
    options = UpcycleOptions(variant="vanilla", experts=(0, 4, 0))
    vanilla = upcycle_checkpoint(llama / "llm", llama / "vision", tmp_path / "vanilla", options)
    report = _compare(vanilla, llama / "checkpoint")
    assert not report.skipped and len(report.mismatches) == 2 * 3
    assert all(".router.gates." in m.name for m in report.mismatches)
    # More experts on one side.
    options = UpcycleOptions(experts=(1, 3, 1))
    five = upcycle_checkpoint(llama / "llm", llama / "vision", tmp_path / "five", options)
    names = [m.name for m in _compare(llama / "checkpoint", five).mismatches]
    assert [n for n in names if "fc2" in n] == [
        f"language_model.decoder.layers.{layer}.mlp.experts.experts.linear_fc2.weight [text.0]"
        for layer in (1, 3)
    ]


def test_other_shapes(llama: Path, tmp_path: Path) -> None:
    wide = write_language(tmp_path / "wide", intermediate_size=56)
    found = {m.name: m for m in _compare(llama / "checkpoint", wide).mismatches}
    layer = "language_model.decoder.layers.1.mlp.experts.experts.linear_fc2.weight [text.0]"
    assert (found[layer].shape_a, found[layer].shape_b) == ((32, 48), (32, 56))
    assert found[layer].difference is None


@pytest.mark.parametrize("is_tower_there", [True, False])
def test_a_checkpoint_of_the_reference_and_its_import(is_tower_there: bool, tmp_path: Path) -> None:
    encoder = write_vision(tmp_path / "encoder")
    theirs = write_reference(tmp_path / "theirs", encoder)
    imported = import_checkpoint(theirs, tmp_path / "imported").folder
    if not is_tower_there:
        encoder.rename(tmp_path / "elsewhere")
    weights = open_weights(theirs)
    assert not weights.is_moiie and len(weights.experts) == 4
    report = compare_tensors(weights, open_weights(imported))
    assert report.is_equal and not report.other_dtype
    # 43 of the language model, 4 of the connector; one layer of the encoder is not there
    tower = 37 - 16
    assert report.compared == 43 + 4 + (tower if is_tower_there else 0)
    assert sum(report.skipped.values()) == (0 if is_tower_there else tower)


def test_a_pretrained_moe(tmp_path: Path) -> None:
    hf_models.language_model("mixtral", num_local_experts=6).save_pretrained(tmp_path / "mixtral")
    write_tokenizer(tmp_path / "mixtral")
    vision, options = write_vision(tmp_path / "vision"), UpcycleOptions(variant="vanilla")
    upcycle_checkpoint(tmp_path / "mixtral", vision, tmp_path / "checkpoint", options)
    report = _compare(tmp_path / "mixtral", tmp_path / "checkpoint")
    assert report.is_equal and not report.dense_pairs
    # embedding, head, final norm; per layer attention, norms, router and experts
    assert report.compared == 3 + 4 * (3 + 1 + 1 + 6 * 2)
    assert all("router" not in part for part in report.skipped)


def test_one_pair_in_memory(llama: Path) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def watched(weights: Weights) -> Weights:
        def get(name: str, expert: int | None) -> Tensor:
            nonlocal most
            tensor = weights.get(name, expert).clone()
            alive.add(tensor)
            most = max(most, len(alive))
            return tensor

        return replace(weights, get=get)

    a, b = (watched(open_weights(llama / name)) for name in ("llm", "checkpoint"))
    seen: list[tuple[int, int]] = []
    assert compare_tensors(a, b, lambda done, total: seen.append((done, total))).is_equal
    assert most == 2 and seen[-1][0] == seen[-1][1] > seen[0][0] > 0


def test_what_cannot_be_opened(llama: Path, tmp_path: Path) -> None:
    def refused(path: Path, *parts: object) -> None:
        with user_error(*parts):
            open_weights(path)

    refused(tmp_path / "none", tmp_path / "none", "There is no")
    refused(tmp_path, tmp_path, "config.json", "run.yaml")
    refused(llama / "vision", "model_type", "'siglip_vision_model'")
    spoilt = Path(shutil.copytree(llama / "checkpoint", tmp_path / "spoilt"))
    torch.save({"format_version": FORMAT_VERSION + 1}, spoilt / "common.pt")
    refused(spoilt, spoilt, "version", FORMAT_VERSION + 1, "update")
    (spoilt / "metadata.json").unlink()
    refused(spoilt, spoilt, "not a complete")
    name = "model.language_model.layers.3.mlp.experts.2.up_proj.weight"
    refused(_changed(llama / "export", tmp_path / "less", name, None), name, "missing")
    file = Path(shutil.copytree(llama / "llm", tmp_path / "cut")) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(tmp_path / "cut", file, "cannot be read")
