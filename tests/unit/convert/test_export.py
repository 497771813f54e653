"""Export: bit-exact round trips, checkpoints that Megatron wrote, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, Phi3Config, SiglipVisionConfig

from moiie_megatron.checkpoint.directory import FORMAT_VERSION
from moiie_megatron.checkpoint.save_load import sharding_metadata
from moiie_megatron.config.load import dump_config, load_config
from moiie_megatron.config.schema import LanguageConfig, LongRope, RopeScaling
from moiie_megatron.convert.export import export_checkpoint, exported_rows
from moiie_megatron.convert.hf.safetensors_writer import INDEX, SafetensorsWriter
from moiie_megatron.convert.hf.weights_source import WeightsSource
from moiie_megatron.convert.upcycle import UpcycleOptions, upcycle_checkpoint
from moiie_megatron.families.hf_config import language_to_hf, vision_to_hf
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.mcore.patches.dist_checkpointing import plan_save
from moiie_megatron.vlm.build import build_model
from tests.helpers.tiny_hf import write_language, write_vision
from tests.helpers.user_errors import user_error
from tests.parity import tiny

DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    llm, vision = write_language(folder / "llm"), write_vision(folder / "vision")
    return upcycle_checkpoint(llm, vision, folder / "checkpoint")


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint, to be spoilt."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


def _read(directory: Path) -> dict[str, Tensor]:
    source = WeightsSource(directory)
    return {name: source.get(name) for name in source.names}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_dense_weights_come_back(
    family: str, is_tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Bit by bit: outside MoE layers as they were, inside them once per expert."""
    llm = write_language(tmp_path / "llm", family, dtype, tie_word_embeddings=is_tied)
    encoder = "clip" if is_tied else "siglip"
    tower = write_vision(tmp_path / "vision", encoder, dtype)
    upcycle_checkpoint(llm, tower, tmp_path / "checkpoint")
    out = export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")

    got = _read(out)
    expected = {
        f"model.vision_tower.{re.sub('^vision_model.', '', name)}": tensor
        for name, tensor in _read(tower).items()
        if not re.search(r"(^|\.)head\.|position_ids", name)
    }
    for name, tensor in _read(llm).items():
        match = re.fullmatch(r"model\.layers\.([13])\.mlp\.(\w+)_proj\.weight", name)
        if match is None:
            expected[re.sub("^model.", "model.language_model.", name)] = tensor
            continue
        parts = {match[2]: tensor}
        if match[2] == "gate_up":
            parts = dict(zip(("gate", "up"), tensor.chunk(2), strict=True))
        for expert in range(4):
            for part, value in parts.items():
                mlp = f"model.language_model.layers.{match[1]}.mlp.experts.{expert}"
                expected[f"{mlp}.{part}_proj.weight"] = value
    fresh = set(got) - set(expected)
    assert all(re.search(r"\.mlp\.gate(_vis)?\.|multi_modal_projector", name) for name in fresh)
    assert len(fresh) == 2 * 2 + 4 and ("lm_head.weight" in got) is not is_tied
    for name, tensor in expected.items():
        assert got[name].dtype == dtype and torch.equal(got[name], tensor), name


@pytest.mark.parametrize("variant", ["moiie", "vanilla", "dense"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_checkpoint_that_megatron_wrote(
    family: str, variant: str, context: ParallelContext, tmp_path: Path
) -> None:
    """Every tensor of the model, through the transform backwards, is in the export."""
    folder = tmp_path / "checkpoint"
    write_language(folder)  # its tokenizer
    for file in (folder / "model.safetensors", folder / "config.json"):
        file.unlink()
    moe = None if variant == "dense" else tiny.MoEConfig(variant=variant)
    config = tiny.run_config(tiny.language(family), moe)
    model = build_model(config, context)
    state = {
        "model": model.sharded_state_dict(metadata=sharding_metadata(context)),
        "format_version": FORMAT_VERSION,
        "progress": {"step": 5},
    }
    plan_save(state, folder, {}).execute_sync()
    (folder / "run.yaml").write_text(dump_config(config))

    got = _read(export_checkpoint(folder, tmp_path / "out"))
    parameters = dict(model.named_parameters())
    local = {  # what the model calls them, where that is not what checkpoints call them
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
        "mlp.experts.experts.linear_fc1.weight": "mlp.experts.weight_fc1",
        "mlp.experts.experts.linear_fc2.weight": "mlp.experts.weight_fc2",
    }
    used = set()
    for row in exported_rows(config):
        name = row.megatron
        for theirs, ours in local.items():
            name = name.replace(theirs, ours)
        used.add(name)
        back = row.transform.to_megatron([got.pop(hf) for hf in row.hf])
        whole = parameters[name]
        assert torch.equal(back, whole if row.expert is None else whole[row.expert]), name
    assert used == set(parameters) and got == {}


def test_config_and_shards(checkpoint: Path, tmp_path: Path) -> None:
    out = export_checkpoint(checkpoint, tmp_path / "out", bytes_per_file=30_000)
    files = sorted(out.glob("model-*.safetensors"))
    assert len(files) > 3 and not (out / "model.safetensors").exists()
    assert all(file.stat().st_size < 30_000 + 10_000 for file in files)
    index = json.loads((out / INDEX).read_text())["weight_map"]
    assert {name for file in files for name in load_file(file)} == set(index)

    values = json.loads((out / "config.json").read_text())
    assert values["model_type"] == "moiie" and values["text_config"]["model_type"] == "llama"
    assert values["experts"] == {"vision": 1, "shared": 2, "text": 1}
    assert values["moe_layers"] == [1, 3] and values["num_experts_per_tok"] == 2
    assert values["num_image_tokens"] == 4 and values["dtype"] == "bfloat16"
    assert values["image_token_id"] == 4  # behind the tokenizer's four words
    assert values["num_added_tokens"] == 0  # the table has more rows
    assert values["auto_map"]["AutoConfig"] == "configuration_moiie.MoiieConfig"
    assert not values["last_image_token_as_text"]
    names = {"modeling_moiie.py", "tokenizer.json", "processor_config.json"}
    assert names | {"generation_config.json"} <= {file.name for file in out.iterdir()}


ROPES = {
    "plain": {},
    "llama3": {"rope_scaling": RopeScaling(factor=8.0)},
    "longrope": {
        "longrope": LongRope(
            short_factor=[1.0] * 8,
            long_factor=[2.0] * 8,
            factor=32.0,
            original_max_position_embeddings=16,
        ),
        "family": "phi3",
        "sliding_window": 30,
    },
}


@pytest.mark.parametrize("name", ROPES)
def test_the_text_config_means_the_same_model(name: str, tmp_path: Path) -> None:
    from moiie_megatron.convert.hf.config import read_language_config

    language = tiny.language("llama").model_copy(update=ROPES[name])
    language = LanguageConfig(**language.model_dump())
    config = language_to_hf(language, {"eos_token_id": 3})
    config.save_pretrained(tmp_path)
    assert isinstance(config, LlamaConfig if name != "longrope" else Phi3Config)
    assert read_language_config(tmp_path) == language


@pytest.mark.parametrize("family", ["siglip", "clip"])
def test_the_vision_config_means_the_same_model(family: str, tmp_path: Path) -> None:
    from moiie_megatron.convert.hf.config import read_vision_config

    vision = tiny.vision(family)
    config = vision_to_hf(vision)
    config.save_pretrained(tmp_path)
    assert isinstance(config, {"siglip": SiglipVisionConfig, "clip": CLIPVisionConfig}[family])
    assert read_vision_config(tmp_path) == vision


def _refused(parts: tuple[object, ...], checkpoint: Path, out: Path) -> None:
    before = sorted(out.parent.rglob("*"))
    with user_error(*parts):
        export_checkpoint(checkpoint, out)
    assert sorted(out.parent.rglob("*")) == before


def test_another_configuration_than_the_tensors(copied: Path, tmp_path: Path) -> None:
    config, out = load_config(copied / "run.yaml"), tmp_path / "out"

    def change(section: str, **values: object) -> None:
        changed = getattr(config, section).model_copy(update=values)
        text = dump_config(config.model_copy(update={section: changed}))
        (copied / "run.yaml").write_text(text)

    change("language", num_layers=6)
    _refused((copied, "language_model.decoder.layers.4"), copied, out)
    change("language", ffn_hidden_size=56)
    _refused((copied, "linear_fc1.weight", "(96, 32)", "(112, 32)"), copied, out)
    change("moe", num_shared_experts=1)
    _refused((copied, "gates.vision", "(3, 32)", "(2, 32)"), copied, out)
    change("moe", num_shared_experts=0)
    _refused(("moe.num_shared_experts", "0", "moiie"), copied, out)


def test_broken_checkpoints(copied: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    file = copied / "__0_0.distcp"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    _refused((copied, file.name, f"instead of {len(whole)}"), copied, out)
    file.write_bytes(whole)
    (copied / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    _refused((copied, "tokenizer.json"), copied, out)
    (tmp_path / "tokenizer.json").rename(copied / "tokenizer.json")
    torch.save({"format_version": FORMAT_VERSION + 1}, copied / "common.pt")
    _refused((copied, "version", FORMAT_VERSION + 1, "update"), copied, out)
    (copied / "metadata.json").unlink()
    _refused((copied, "not a complete"), copied, out)
    _refused((tmp_path / "none", "no checkpoint"), tmp_path / "none", out)


def test_a_full_disk_and_an_existing_folder(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        _refused((out, "0.00 GB free", "make room"), checkpoint, out)
    export_checkpoint(checkpoint, out)
    _refused((out, "exists", "--force"), checkpoint, out)
    (out / "generation_config.json").unlink()
    export_checkpoint(checkpoint, out, force=True)
    assert (out / "generation_config.json").is_file()


def test_an_error_in_the_middle_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(SafetensorsWriter, "finish", full)
    with user_error("No space left"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_dense_checkpoint(tmp_path: Path) -> None:
    llm, vision = write_language(tmp_path / "llm"), write_vision(tmp_path / "vision")
    upcycle_checkpoint(llm, vision, tmp_path / "ckpt", UpcycleOptions(variant="dense"))
    out = export_checkpoint(tmp_path / "ckpt", tmp_path / "out")
    values = json.loads((out / "config.json").read_text())
    assert values["moe_layers"] == [] and not any(values["experts"].values())
    assert not any(".mlp.gate." in name or ".experts." in name for name in _read(out))
