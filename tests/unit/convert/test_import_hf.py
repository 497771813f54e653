"""Exports and checkpoints of the reference become Megatron checkpoints; others are refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moiie_megatron.config import yaml_text
from moiie_megatron.config.load import load_config
from moiie_megatron.convert.dcp.reader import CheckpointReader
from moiie_megatron.convert.export import export_checkpoint
from moiie_megatron.convert.import_hf import import_checkpoint
from moiie_megatron.convert.upcycle import UpcycleOptions, upcycle_checkpoint
from moiie_megatron.data.encode.tokenizers import load_tokenizer
from tests.helpers.reference import PROJECTOR, TOWER, write_reference
from tests.helpers.tiny_hf import write_language, write_vision
from tests.helpers.user_errors import user_error

VARIANTS = {
    "moiie": UpcycleOptions(perturb=0.1),
    "moiie8": UpcycleOptions(perturb=0.1, experts=(2, 4, 2), layers="all", top_k=3),
    "vanilla": UpcycleOptions(perturb=0.1, variant="vanilla", layers=[2]),
    "modality": UpcycleOptions(perturb=0.1, variant="modality", experts=(3, 0, 2)),
    "dense": UpcycleOptions(variant="dense"),
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vision(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def trained(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reference(tmp_path_factory.mktemp("reference"), encoder)


@pytest.fixture
def spoilt(trained: Path, tmp_path: Path) -> Path:
    """A copy of the reference's checkpoint, to be changed."""
    return shutil.copytree(trained, tmp_path / "theirs")


@pytest.fixture(scope="module")
def exported(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    upcycle_checkpoint(write_language(folder / "llm"), encoder, folder / "checkpoint")
    return export_checkpoint(folder / "checkpoint", folder / "export")


def _change_config(directory: Path, **values: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def _change_weights(directory: Path, **renamed: str | None) -> None:
    """Delete or rename tensors."""
    weights = load_file(directory / "model.safetensors")
    for name, other in renamed.items():
        tensor = weights.pop(name)
        if other is not None:
            weights[other] = tensor
    save_file(weights, directory / "model.safetensors")


@pytest.mark.parametrize("name", VARIANTS)
def test_an_export_comes_back(name: str, tmp_path: Path) -> None:
    """Every tensor with its dtype, and the next export is the same file for file."""
    is_phi3, is_fp32 = name in ("moiie", "vanilla"), name in ("moiie8", "dense")
    dtype = torch.float32 if is_fp32 else torch.bfloat16
    is_tied, family = name in ("vanilla", "dense"), "phi3" if is_phi3 else "llama"
    llm = write_language(tmp_path / "llm", family, dtype, tie_word_embeddings=is_tied)
    tower = write_vision(tmp_path / "tower", "clip" if name == "modality" else "siglip", dtype)
    first, second = tmp_path / "first", tmp_path / "second"
    upcycle_checkpoint(llm, tower, first, VARIANTS[name])
    export_checkpoint(first, tmp_path / "a")
    assert import_checkpoint(tmp_path / "a", second).notes == ()
    export_checkpoint(second, tmp_path / "b")

    ours, theirs = CheckpointReader(first), CheckpointReader(second)
    assert ours.tensors == theirs.tensors and len(ours.tensors) > 40
    for tensor in ours.tensors:
        assert torch.equal(ours.get(tensor), theirs.get(tensor)), tensor
    for section in ("language", "vision", "moe"):
        assert getattr(ours.config, section) == getattr(theirs.config, section)
    assert ours.config.stage == theirs.config.stage
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "b").iterdir())
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_what_an_export_says_is_kept(exported: Path, tmp_path: Path) -> None:
    """Its image token lies behind the vocabulary of the model, so training can go on."""
    directory = shutil.copytree(exported, tmp_path / "export")
    _change_config(
        directory, last_image_token_as_text=True, router_dtype="model", vision_feature_layer=-1
    )
    file = directory / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mode": "square"}))
    result = import_checkpoint(directory, tmp_path / "out", last_image_token_as_text=False)
    config = load_config(tmp_path / "out" / "run.yaml")
    assert result.notes == ()
    assert config.moe.last_image_token_as_text and config.moe.router_dtype == "model"
    assert config.vision.feature_layer == -1 and config.vision.num_layers == 2
    assert config.stage.image_mode == "square"
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.vocab_size == 4 and tokenizer.image_id == 4


def test_a_checkpoint_of_the_reference(trained: Path, encoder: Path, tmp_path: Path) -> None:
    result = import_checkpoint(trained, tmp_path / "out")
    reader = CheckpointReader(tmp_path / "out")
    config, report = (
        reader.config,
        json.loads((tmp_path / "out" / "conversion_report.json").read_text()),
    )
    assert len(result.notes) == 1 and "--last-image-token-as-text" in result.notes[0]
    assert (config.moe.variant, config.moe.layers) == ("moiie", "interleaved")
    assert config.moe.layout.num_shared == 2 and not config.moe.last_image_token_as_text
    assert (config.moe.vision_aux_loss_coeff, config.moe.text_aux_loss_coeff) == (0.05, 0.03)
    assert config.moe.aux_loss == "pooled" and config.moe.router_dtype == "model"
    assert config.stage.image_mode == "pad" and config.connector.hidden_size == 24
    # The tower ends where the features are.
    assert (config.vision.num_layers, config.vision.feature_layer) == (1, -1)
    assert report["operation"] == "import" and str(trained / "model.safetensors") in str(report)

    weights = load_file(trained / "model.safetensors")
    stored = reader.get("language_model.decoder.layers.3.mlp.experts.experts.linear_fc2.weight", 3)
    assert torch.equal(stored, weights["model.layers.3.mlp.experts.3.down_proj.weight"])
    stored = reader.get("language_model.decoder.layers.1.mlp.router.gates.vision")
    assert torch.equal(stored, weights["model.layers.1.mlp.gate_vis.weight"])
    assert torch.equal(reader.get("connector.linear_2.weight"), weights[PROJECTOR + "2.weight"])
    name = "encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(reader.get(f"vision_encoder.model.{name}"), weights[TOWER + name])


def test_the_mask_is_passed_on(trained: Path, tmp_path: Path) -> None:
    result = import_checkpoint(trained, tmp_path / "first", last_image_token_as_text=True)
    assert result.notes == ()
    export_checkpoint(tmp_path / "first", tmp_path / "export")
    assert (
        json.loads((tmp_path / "export" / "config.json").read_text())["last_image_token_as_text"]
        is True
    )
    import_checkpoint(tmp_path / "export", tmp_path / "second")
    assert yaml_text.parse((tmp_path / "second" / "run.yaml").read_text(), "")["moe"][
        "last_image_token_as_text"
    ]


def _with_eight_experts(directory: Path) -> dict[str, torch.Tensor]:
    weights = load_file(directory / "model.safetensors")
    for name in list(weights):
        if ".mlp.gate" in name and "proj" not in name:
            weights[name] = torch.cat([weights[name]] * 2)
        elif match := re.search(r"\.experts\.(\d)\.", name):
            other = name.replace(match[0], f".experts.{int(match[1]) + 4}.")
            weights[other] = weights[name] + 1
    save_file(weights, directory / "model.safetensors")
    return weights


def test_eight_experts_can_be_two_things(spoilt: Path, tmp_path: Path) -> None:
    """The published code reads the text router's columns from expert 1 on, whatever the number
    of experts; its last expert is dead weight."""
    weights = _with_eight_experts(spoilt)
    with user_error(spoilt, "--experts 1,5,1", "2,4,2"):
        import_checkpoint(spoilt, tmp_path / "out")
    with user_error("2,3,3", "2,4,2 or 1,5,1"):
        import_checkpoint(spoilt, tmp_path / "out", groups=(2, 3, 3))
    assert not (tmp_path / "out").exists()
    fc2 = "language_model.decoder.layers.1.mlp.experts.experts.linear_fc2.weight"
    for groups, count in (((1, 5, 1), 7), ((2, 4, 2), 8)):
        import_checkpoint(spoilt, tmp_path / "out", groups=groups, force=True)
        reader = CheckpointReader(tmp_path / "out")
        layout = reader.config.moe.layout
        assert (layout.num_vision, layout.num_shared, layout.num_text) == groups
        assert reader.tensors[fc2].shape[0] == count
        stored = reader.get(fc2, 6)
        assert torch.equal(stored, weights["model.layers.1.mlp.experts.6.down_proj.weight"])


def test_vision_from_elsewhere(spoilt: Path, encoder: Path, tmp_path: Path) -> None:
    """Weights of the language side alone: the tower is the encoder's, the connector fresh."""
    weights = load_file(spoilt / "model.safetensors")
    kept = {n: t for n, t in weights.items() if not n.startswith((TOWER, PROJECTOR))}
    save_file(kept, spoilt / "model.safetensors")
    _change_config(spoilt, mm_vision_tower="some/name-on-the-hub")
    with user_error(spoilt, "some/name-on-the-hub", "--vision"):
        import_checkpoint(spoilt, tmp_path / "out")
    result = import_checkpoint(
        spoilt, tmp_path / "out", vision=encoder, last_image_token_as_text=True
    )
    assert len(result.notes) == 1 and "no connector" in result.notes[0]
    reader = CheckpointReader(tmp_path / "out")
    assert reader.config.vision.num_layers == 2 and reader.config.vision.feature_layer == -2
    assert reader.get("connector.linear_1.weight").std() > 0.01
    theirs = load_file(encoder / "model.safetensors")
    name = "encoder.layers.1.mlp.fc1.weight"
    assert torch.equal(reader.get(f"vision_encoder.model.{name}"), theirs[name])


GATE = "model.layers.1.mlp.gate.weight"
EXPERT = "model.layers.3.mlp.experts.2.up_proj.weight"
PROBLEMS = {
    "no expert": ({EXPERT: None}, {}, (EXPERT, "missing")),
    "no last expert": (
        {f"model.layers.3.mlp.experts.3.{x}_proj.weight": None for x in ("gate", "up", "down")},
        {},
        ("different numbers", "experts"),
    ),
    "no router": ({GATE: None}, {}, ("different numbers", "router rows")),
    "too much": ({"lm_head.weight": "lm_tail.weight"}, {}, ("lm_",)),
    "no connector": (
        {f"{PROJECTOR}{i}.{kind}": None for i in (0, 2) for kind in ("weight", "bias")},
        {},
        ("no connector", "mm_projector"),
    ),
    "half a connector": ({PROJECTOR + "2.bias": None}, {}, ("mm_projector.2.bias", "missing")),
    "short tower": (
        {
            f"{TOWER}encoder.layers.0.{part}.{kind}": None
            for part in (
                "layer_norm1",
                "layer_norm2",
                "mlp.fc1",
                "mlp.fc2",
                *tuple(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")),
            )
            for kind in ("weight", "bias")
        },
        {},
        ("0 layers", "2"),
    ),
    "other family": ({}, {"model_type": "qwen_moiie"}, ("model_type", "qwen_moiie")),
    "top k": ({}, {"num_experts_per_tok": 4}, ("top_k", "4")),
    "no number": ({}, {"num_experts_per_tok": "two"}, ("config.json", "experts")),
    "other sizes": ({}, {"intermediate_size": 64}, ("config.json",)),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_does_not_fit_is_refused(name: str, spoilt: Path, tmp_path: Path) -> None:
    tensors, config, parts = PROBLEMS[name]
    _change_weights(spoilt, **tensors)
    _change_config(spoilt, **config)
    with user_error(*parts):
        import_checkpoint(spoilt, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


def test_a_cut_file_and_no_tokenizer(spoilt: Path, tmp_path: Path) -> None:
    file = spoilt / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with user_error(file, "cannot be read"):
        import_checkpoint(spoilt, tmp_path / "out")
    file.write_bytes(content)
    (spoilt / "tokenizer.json").unlink()
    with user_error(spoilt, "tokenizer.json"):
        import_checkpoint(spoilt, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_exports_that_contradict_themselves(exported: Path, encoder: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(exported, tmp_path / "export")
    with user_error(directory, "vision tower", encoder):
        import_checkpoint(directory, tmp_path / "out", vision=encoder)
    with user_error(directory, "1,2,1"):
        import_checkpoint(directory, tmp_path / "out", groups=(1, 2, 1))
    _change_config(directory, moe_layers=[])
    with user_error(directory, "[1, 3]", "[]"):
        import_checkpoint(directory, tmp_path / "out")
    _change_config(directory, moe_layers=[1, 2])
    with user_error(directory, "[1, 3]", "[1, 2]"):
        import_checkpoint(directory, tmp_path / "out")
    _change_config(directory, moe_layers=[1, 3], experts={"vision": 1, "shared": 2, "text": 2})
    with user_error("layers.1.mlp.experts.4.gate_proj.weight", "missing"):
        import_checkpoint(directory, tmp_path / "out")


def test_a_dense_model_has_no_mask(encoder: Path, tmp_path: Path) -> None:
    llm = write_language(tmp_path / "llm")
    upcycle_checkpoint(llm, encoder, tmp_path / "dense", VARIANTS["dense"])
    export_checkpoint(tmp_path / "dense", tmp_path / "export")
    with user_error("has no experts", "reference mask"):
        import_checkpoint(tmp_path / "export", tmp_path / "out", last_image_token_as_text=True)


def test_what_is_there_stays(trained: Path, tmp_path: Path) -> None:
    import_checkpoint(trained, tmp_path / "out")
    before = (tmp_path / "out" / ".metadata").stat().st_mtime_ns
    with user_error(tmp_path / "out", "exists", "another directory"):
        import_checkpoint(trained, tmp_path / "out")
    assert (tmp_path / "out" / ".metadata").stat().st_mtime_ns == before
    import_checkpoint(trained, tmp_path / "out", force=True)
    assert (tmp_path / "out" / ".metadata").stat().st_mtime_ns > before
