"""Offline upcycling: against upcycling at load, its report, noise, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from moiie_megatron.checkpoint.load_weights import load_weights
from moiie_megatron.config.load import load_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.convert.dcp.reader import CheckpointReader
from moiie_megatron.convert.load_pretrained import load_pretrained
from moiie_megatron.convert.upcycle import UpcycleOptions, upcycle_checkpoint
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.vlm.build import build_model
from moiie_megatron.vlm.model import MoIIEModel
from tests.helpers.tiny_hf import write_language, write_vision
from tests.helpers.user_errors import user_error

FC1 = "language_model.decoder.layers.{}.mlp.experts.experts.linear_fc1.weight"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vision(tmp_path_factory.mktemp("vision"))


@pytest.fixture
def copied(llm: Path, tmp_path: Path) -> Path:
    """The language model, to be spoilt."""
    shutil.copytree(llm, tmp_path / "llm")
    return tmp_path / "llm"


def _model(config: RunConfig, context: ParallelContext) -> MoIIEModel:
    train = config.train.model_copy(update={"device": "cpu"})
    return build_model(config.model_copy(update={"train": train}), context)


def _connector(file: Path, prefix: str = "") -> Path:
    torch.manual_seed(9)
    shapes = {"0.weight": (24, 16), "0.bias": (24,), "2.weight": (32, 24), "2.bias": (32,)}
    save_file({prefix + name: torch.randn(shape) for name, shape in shapes.items()}, file)
    return file


VARIANTS = {
    "moiie": UpcycleOptions(),
    "moiie8": UpcycleOptions(experts=(2, 4, 2), layers="all"),
    "vanilla": UpcycleOptions(variant="vanilla", layers=[2]),
    "modality": UpcycleOptions(variant="modality", experts=(3, 0, 2)),
    "dense": UpcycleOptions(variant="dense"),
}


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("name", VARIANTS)
def test_equals_upcycling_at_load(
    name: str, family: str, context: ParallelContext, tmp_path: Path
) -> None:
    """Both doors give the same tensors: routers and a connector of another size included."""
    dtype = torch.float32 if name == "vanilla" else torch.bfloat16
    is_tied, encoder = name == "moiie8", "clip" if name == "dense" else "siglip"
    llm = write_language(tmp_path / "llm", family, dtype, tie_word_embeddings=is_tied)
    # Towers on the hub are in fp32, whatever the language model: training casts.
    tower = write_vision(tmp_path / "vision", encoder, torch.float32)
    connector = _connector(tmp_path / "connector.safetensors", "model.mm_projector.")
    upcycle_checkpoint(llm, tower, tmp_path / "out", VARIANTS[name], connector=connector)

    config = load_config(tmp_path / "out" / "run.yaml")
    offline, online = _model(config, context), _model(config, context)
    with torch.no_grad():
        for parameter in offline.parameters():
            parameter.fill_(float("nan"))
    load_weights(tmp_path / "out", context, offline)

    weights = load_file(llm / "model.safetensors")
    weights |= {k: v.to(dtype) for k, v in load_file(connector).items()}
    save_file(weights, llm / "model.safetensors")
    sources = {"language": {"pretrained": str(llm)}, "vision": {"pretrained": str(tower)}}
    sections = {k: getattr(config, k).model_copy(update=v) for k, v in sources.items()}
    fresh = load_pretrained(online, config.model_copy(update=sections))
    assert all(".router.gates." in name for name in fresh)
    expected = dict(online.named_parameters())
    assert len(expected) > 40
    for key, parameter in offline.named_parameters():
        assert torch.equal(parameter, expected[key]), key


def test_the_report(llm: Path, vision: Path, tmp_path: Path) -> None:
    upcycle_checkpoint(llm, vision, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    reader = CheckpointReader(tmp_path / "out")

    file = llm / "model.safetensors"
    source = report["sources"][str(file)]
    assert source["digest"] == xxhash.xxh3_128(file.read_bytes()).hexdigest()
    assert source["bytes"] == file.stat().st_size
    assert report["tensors"].keys() == reader.tensors.keys()
    for name, entry in report["tensors"].items():
        parts = list(entry["digests"].values()) if "digests" in entry else [entry["digest"]]
        for number, digest in enumerate(parts):
            stored = reader.get(name, number if "digests" in entry else None)
            content = stored.contiguous().view(torch.int16).numpy().tobytes()
            assert digest == xxhash.xxh3_128(content).hexdigest(), name
            assert entry["shape"] == list(stored.shape) and entry["dtype"] == "bfloat16"
    names = ["vision.0", "shared.0", "shared.1", "text.0"]
    assert list(report["tensors"][FC1.format(1)]["digests"]) == names
    assert report["experts_equal_dense_ffn"] == {
        layer: dict.fromkeys(names, True) for layer in ("1", "3")
    }
    gate = reader.get("language_model.decoder.layers.3.mlp.router.gates.text").float()
    noted = report["routers"]["language_model.decoder.layers.3.mlp.router.gates.text"]
    assert noted == {"mean": gate.mean().item(), "std": gate.std().item()}
    assert 0.01 < noted["std"] < 0.03
    assert report["digests"] == {"sources": "xxh3_128", "tensors": "xxh3_128"}
    assert report["operation"] == "upcycle" and report["options"]["variant"] == "moiie"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_noise_on_the_copies(dtype: torch.dtype, vision: Path, tmp_path: Path) -> None:
    """Relative to the tensor, different in every expert, the same every time."""
    llm = write_language(tmp_path / "llm", dtype=dtype)
    for name, perturb, seed in (("plain", 0.0, 1), ("a", 0.1, 1), ("b", 0.1, 1), ("c", 0.1, 2)):
        options = UpcycleOptions(perturb=perturb, seed=seed)
        upcycle_checkpoint(llm, vision, tmp_path / name, options)
    readers = {name: CheckpointReader(tmp_path / name) for name in ("plain", "a", "b", "c")}
    noises = []
    for layer in (1, 3):
        for part in ("linear_fc1", "linear_fc2"):
            name = FC1.format(layer).replace("linear_fc1", part)
            dense = readers["plain"].get(name, 0).float()
            for expert in range(4):
                noisy = readers["a"].get(name, expert)
                assert torch.equal(noisy, readers["b"].get(name, expert))
                assert not torch.equal(noisy, readers["c"].get(name, expert))
                noise = (noisy.float() - dense) / dense.square().mean().sqrt()
                # 1536 or 3072 values: the standard deviation of a sample is off by up to 6 %
                assert noise.std().item() == pytest.approx(0.1, rel=0.06)
                noises.append(noise.flatten()[:1536])
    correlations = torch.corrcoef(torch.stack(noises)).fill_diagonal_(0)
    assert correlations.abs().max() < 0.15  # 1 / sqrt(1536) = 0.026 is typical
    report = json.loads((tmp_path / "a" / "conversion_report.json").read_text())
    flags = [x for layer in report["experts_equal_dense_ffn"].values() for x in layer.values()]
    assert len(flags) == 8 and not any(flags)


def test_what_lies_beside_the_weights(llm: Path, vision: Path, tmp_path: Path) -> None:
    (vision / "preprocessor_config.json").write_text("{}")
    out = upcycle_checkpoint(llm, vision, tmp_path / "out", UpcycleOptions(seed=7))
    (vision / "preprocessor_config.json").unlink()
    assert (out / "tokenizer.json").is_file() and (out / "preprocessor_config.json").is_file()
    config = load_config(out / "run.yaml")
    assert config.checkpoint.init_from == str(out) and config.data.tokenizer == str(out)
    assert config.train.seed == 7 and config.train.precision == "bf16"
    assert config.language.pretrained is None


def _refused(
    parts: tuple[object, ...], llm: Path, vision: Path, out: Path, **options: object
) -> None:
    before = sorted(out.parent.rglob("*"))
    with user_error(*parts):
        upcycle_checkpoint(llm, vision, out, UpcycleOptions(**options))  # type: ignore[arg-type]
    assert sorted(out.parent.rglob("*")) == before


def test_impossible_options(llm: Path, vision: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _refused(
        ("moe.num_shared_experts", "modality"),
        llm,
        vision,
        out,
        variant="modality",
        experts=(1, 1, 1),
    )
    _refused(("moe.layers", "[9]", "interleaved"), llm, vision, out, layers=[9])
    for perturb in (-1.0, math.nan, math.inf, -math.inf, 1e300):
        _refused(("perturb", str(perturb), "finite"), llm, vision, out, perturb=perturb)
    _refused(("moe.top_k", "4", "3 experts"), llm, vision, out, top_k=4)
    _refused(("moe.top_k", "1", "2 or more"), llm, vision, out, top_k=1)
    _refused(("moe.top_k", "0", "above 0"), llm, vision, out, top_k=0)


def test_truncated_weights(copied: Path, vision: Path, tmp_path: Path) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    _refused((file, "cannot be read"), copied, vision, tmp_path / "out")


def test_missing_superfluous_and_misshapen_tensors(
    copied: Path, vision: Path, tmp_path: Path
) -> None:
    file, out = copied / "model.safetensors", tmp_path / "out"
    whole, name = load_file(file), "model.layers.2.mlp.up_proj.weight"
    save_file({k: v for k, v in whole.items() if k != name}, file)
    _refused((name, "missing", copied), copied, vision, out)
    save_file(whole | {"model.layers.2.bias": torch.zeros(1)}, file)
    _refused((copied, "model.layers.2.bias"), copied, vision, out)
    save_file(whole | {name: torch.zeros(24, 32)}, file)
    _refused(("linear_fc1.weight", "(72, 32)", "(96, 32)"), copied, vision, out)
    save_file(whole | {name: torch.zeros(48, 31)}, file)
    _refused((copied, f"{name} (48, 31)"), copied, vision, out)
    save_file(whole | {name: torch.zeros(48, 32, dtype=torch.int8)}, file)
    _refused((name, file, "I8"), copied, vision, out)


def test_another_family_and_no_tokenizer(copied: Path, vision: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _refused(("model_type", "'siglip_vision_model'"), vision, vision, out)
    _refused(("model_type", "'llama'"), copied, copied, out)
    (copied / "tokenizer.json").unlink()
    _refused((copied, "tokenizer.json"), copied, vision, out)


def test_a_connector_that_is_none(llm: Path, vision: Path, tmp_path: Path) -> None:
    file = tmp_path / "connector.safetensors"
    save_file({"1.weight": torch.zeros(2)}, file)
    with user_error(file, "connector"):
        upcycle_checkpoint(llm, vision, tmp_path / "out", connector=file)
    _connector(file)
    weights = load_file(file) | {"2.weight": torch.zeros(33, 24)}
    save_file(weights, file)
    with user_error("linear_2.weight", "(33, 24)"):
        upcycle_checkpoint(llm, vision, tmp_path / "out", connector=file)
    assert not (tmp_path / "out").exists()


def test_a_full_disk(
    llm: Path, vision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    _refused((tmp_path / "out", "0.00 GB free", "make room"), llm, vision, tmp_path / "out")


def test_an_existing_checkpoint(llm: Path, vision: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    upcycle_checkpoint(llm, vision, out)
    _refused((out, "exists", "--force"), llm, vision, out, seed=5)
    upcycle_checkpoint(llm, vision, out, UpcycleOptions(seed=5), force=True)
    assert load_config(out / "run.yaml").train.seed == 5
